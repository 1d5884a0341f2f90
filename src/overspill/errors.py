"""The exceptions of overspill.

Three kinds of failure, three ways to say so (docs: ARCHITECTURE.md, "Errors"):

* wrong input        -> `ValueError` (or a subclass below), raised where the value is used;
* broken invariant   -> `assert`, never with a side effect in it;
* the world failing  -> an `OverspillError` subclass, raised `from` its cause.

Every message says what failed, on which tensor, file or unit, both numbers with their units, and what to change.
"""

from __future__ import annotations


class OverspillError(Exception):
    """Base of everything that overspill raises because the world, and not the caller, failed."""


class UnsupportedModelError(ValueError):
    """The model does something that streaming cannot reproduce exactly; the message names the model and the reason."""


class ModelFolderError(ValueError):
    """A model folder or hub name cannot be used: missing, no safetensors, names that do not fit, a pickle."""


class DataError(ValueError):
    """Training data cannot be used: missing file, wrong fields, no sample left, a sample longer than the limit."""


class BudgetError(ValueError):
    """A budget is too small; the message has the missing bytes and the flag that cures it."""


class ScheduleError(ValueError):
    """A schedule breaks one of its rules (`scheduling.validate`); the message names the op and the rule."""


class StorageError(OverspillError):
    """Reading or writing a file failed: what, path, offset, bytes wanted and done, the errno."""


class HostMemoryError(OverspillError):
    """Host memory is nearly used up and the run stopped before the kernel would end it; the message names what grew."""


class NonFiniteError(OverspillError):
    """A loss or a gradient is not finite; the message names where it showed and which weights were already updated."""
