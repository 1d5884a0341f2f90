"""Who holds a directory: a note beside the locked file, for the message that refuses a second run.

The lock itself is the `flock` on the extents (`extent_file.py`), which ends with its process. The note only says whose it is,
so a note without a lock is from a run that was killed, and is replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from overspill.errors import StorageError

NOTE_NAME = "overspill.lock"


class RunNote:
    """The note of this process in `folder`; written at once, while the lock is held."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NOTE_NAME
        self.left_behind = read_holder(folder)
        """What a killed run left here, as text for people; empty if the last run ended properly."""
        note = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime()),
            "command": " ".join(sys.argv),
        }
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):  # a note that cannot be written is no reason to stop
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(note, file)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class DirectoryLock:
    """A directory that holds manifests but no data file, locked as such.

    Raises:
        StorageError: another run has it, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"the checkpoint directory {folder} cannot be used ({error.strerror}); give another") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise StorageError(f"{folder} is in use by another run; wait for it or give another directory") from error

    def close(self) -> None:
        """Closing again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def read_holder(folder: Path) -> str:
    """` (pid 7 on host, since ..., command)` of the note in `folder`; empty if there is none that can be read."""
    try:
        note = json.loads((folder / NOTE_NAME).read_text(encoding="utf-8"))
        return f" (pid {note['pid']} on {note['host']}, since {note['started']}: {note['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
