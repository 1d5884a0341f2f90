"""What a training process takes of the host, measured the same way for every system. Standard library only.

Three witnesses, because each misses something:

* **VmHWM**: most resident bytes of the process itself. Set back by `/proc/self/clear_refs` where the kernel permits it, so that
  opening and training are told apart. Misses what a driver pins outside of the process's own mappings.
* **the fall of MemAvailable**: how much less the machine had to give than before the process began. Misses nothing that cannot be
  dropped; sees other processes too, so nothing else should run. The page cache does not count, because it can be dropped.
* **the fall of MemFree**, and the control group's peak: with the page cache.

MemAvailable and MemFree are watched by a child process (a thread would wait for the interpreter's lock while the training holds
it). The child is 10 MB of Python, which the falls include for every system alike.

Bytes of the SSD: `/proc/self/io` (of this process, past the page cache) and `/proc/diskstats` (of the drive, all processes).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PERIOD_S = 0.01
"""Time between two looks. Chosen: allocations that are pinned take longer than this for 32 MiB."""
SECTOR_BYTES = 512
"""Unit of /proc/diskstats, whatever the drive's own sector is."""
WITNESSES = ("MemAvailable", "MemFree")


# -- the process itself ----------------------------------------------------------------------------------------------


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status that is given in kB; 0 if the process is gone or has no such field."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    return 0


def reset_peak() -> bool:
    """Let VmHWM start again from what is resident now; whether the kernel permitted it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


# -- the watch -------------------------------------------------------------------------------------------------------


class HostWatch:
    """Watches the machine's memory from now on, in a child process.

    Args:
        floor_bytes: when MemAvailable falls below it, this process is killed before the machine is; None: never.
        last_words: file for what was seen, if that happens.
    """

    def __init__(self, *, floor_bytes: int | None = None, last_words: Path | None = None) -> None:
        command = [sys.executable, "-S", "-E", str(Path(__file__).resolve()), "--pid", str(os.getpid())]
        if floor_bytes is not None:
            command += ["--floor-bytes", str(floor_bytes)]
        if last_words is not None:
            command += ["--last-words", str(last_words)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask()
        self.is_resettable = reset_peak()

    def read(self) -> dict[str, Any]:
        """What was seen since the last `read` (or the start), in bytes; then the peaks start again."""
        seen = self._ask()
        seen["vm_hwm_bytes"] = status_bytes("VmHWM")
        seen["vm_rss_bytes"] = status_bytes("VmRSS")
        reset_peak()
        return seen

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._child.stdin.close()  # type: ignore[union-attr]
        self._child.wait(timeout=10)
        self._child.stdout.close()  # type: ignore[union-attr]

    def _ask(self) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write("read\n")
        self._child.stdin.flush()
        return dict(json.loads(self._child.stdout.readline()))


def _watch(pid: int, floor_bytes: int | None, last_words: Path | None) -> None:
    """The child: looks every `PERIOD_S`, answers each line of its input with what it saw, ends with its input."""
    first = meminfo()
    lowest, cgroup_most = dict(first), _cgroup_bytes()
    while True:
        now = meminfo()
        lowest = {name: min(lowest[name], now[name]) for name in WITNESSES}
        cgroup_most = max(cgroup_most, _cgroup_bytes())
        seen = {
            "available_at_start_bytes": first["MemAvailable"],
            "available_fall_bytes": max(0, first["MemAvailable"] - lowest["MemAvailable"]),
            "free_fall_bytes": max(0, first["MemFree"] - lowest["MemFree"]),
            "cgroup_peak_bytes": cgroup_most,
        }
        if floor_bytes is not None and now["MemAvailable"] < floor_bytes:
            if last_words is not None:
                reason = f"stopped: MemAvailable fell to {now['MemAvailable']} B, below the floor of {floor_bytes} B"
                last_words.write_text(json.dumps({"error": reason, **seen}))
            os.kill(pid, signal.SIGKILL)
            return
        ready, _, _ = select.select([sys.stdin], [], [], PERIOD_S)
        if ready:
            if not sys.stdin.readline():
                return
            print(json.dumps(seen), flush=True)
            lowest, cgroup_most = meminfo(), _cgroup_bytes()


def meminfo() -> dict[str, int]:
    """MemAvailable and MemFree of the machine, in bytes."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in WITNESSES:
            found[name] = int(value.split()[0]) * 1024
    return found


def _cgroup_bytes() -> int:
    """Memory of the machine's or container's own control group, page cache included; 0 where none is shown."""
    for name in ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(name).read_text())
    return 0


# -- the SSD ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class IoCount:
    """Bytes moved so far; two counts subtract."""

    process_read_bytes: int
    process_written_bytes: int
    drive_read_bytes: int
    drive_written_bytes: int

    def __sub__(self, earlier: IoCount) -> IoCount:
        return IoCount(**{name: value - getattr(earlier, name) for name, value in dataclasses.asdict(self).items()})


class IoCounters:
    """Counts the bytes of this process, and of the drive that holds `directory` (all drives if that one has no line)."""

    def __init__(self, directory: Path) -> None:
        existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        number = os.stat(existing).st_dev
        self._key = (os.major(number), os.minor(number))
        self.drive = "all drives"
        for fields in _diskstats():
            if (int(fields[0]), int(fields[1])) == self._key:
                self.drive = fields[2]

    def read(self) -> IoCount:
        own = {}
        with contextlib.suppress(OSError):
            own = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        read, written = 0, 0
        for fields in _diskstats():
            if fields[2] == self.drive or (self.drive == "all drives" and Path(f"/sys/block/{fields[2]}/device").exists()):
                read += int(fields[5]) * SECTOR_BYTES
                written += int(fields[9]) * SECTOR_BYTES
        return IoCount(
            process_read_bytes=int(own.get("read_bytes", 0)),
            process_written_bytes=int(own.get("write_bytes", 0)),
            drive_read_bytes=read,
            drive_written_bytes=written,
        )


def _diskstats() -> list[list[str]]:
    try:
        return [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    except OSError:
        return []


# -- results ---------------------------------------------------------------------------------------------------------


def append_result(path: Path, result: dict[str, Any]) -> None:
    """One run is one line of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results of a file; a line that was cut off by an early end is none."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(dict(json.loads(text)))
        except ValueError:
            print(f"{path}: a line that is no JSON is left out: {text[:60]!r}", file=sys.stderr)
    return found


def provenance() -> dict[str, Any]:
    """Where a result comes from."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": done.stdout.strip() or "unknown",
        "num_cpus": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="watch the memory of the machine for one process")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--floor-bytes", type=int)
    parser.add_argument("--last-words", type=Path)
    options = parser.parse_args()
    _watch(options.pid, options.floor_bytes, options.last_words)


if __name__ == "__main__":
    main()
