"""Closing what was opened, also while an error is on its way: the error stays the one that is told, what closing finds is a note on it.

A store that closes raises a failure of a transfer that nobody waited for. On the way out of Ctrl-C that transfer is usually the one that
Ctrl-C stopped waiting for, and its failure must not take the interruption's place.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from overspill.errors import StorageError


def close_after(error: BaseException, close: Callable[[], None]) -> None:
    """Call `close` on the way out of `error`; a StorageError becomes a note on that."""
    try:
        close()
    except StorageError as unseen:
        error.add_note(str(unseen))


class Closing:
    """A context manager of whatever has a `close`: leaving the block closes."""

    def close(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has to say how it closes")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            close_after(error, self.close)
