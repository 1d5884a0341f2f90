"""The four parts of MemAscend (arXiv:2505.23254), each replaced by what it replaced: for measuring what it contributes.

The package has no switch for these; nobody should want them off. What is exchanged here, and at which seam:

| part | switched off | seam |
|---|---|---|
| `pool` | every slot of host memory is as large as the model's largest tensor (DeepSpeed's swap buffers) | `Arena` |
| `pinned` | torch's caching host allocator, which rounds up to powers of two and keeps what is freed | `Memory.allocate` |
| `check` | each gradient is looked at by `isinf(x).any()` and `isnan(x).any()` on an fp32 copy in host memory | `optim.sum_of_squares` |
| `check-flat` | the same on all gradients of a step in one flat fp32 buffer, which is how DeepSpeed keeps them | the same |
| `engine` | one file a tensor through the page cache, by Python, instead of direct I/O on extents | `Session(open_store=...)` |

`sum_of_squares` is the seam of the check because the package calls it once for every finished gradient tensor: its norm and its
overflow check are one. A class or function is exchanged wherever a module of the package refers to it; if none does, the seam
has moved and `exchanged` says so instead of measuring nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import overspill.runtime.session  # noqa: F401  # loads every module that refers to what is exchanged
from overspill.errors import BudgetError, StorageError
from overspill.optim import sum_of_squares
from overspill.tiers import Arena, HostMemory, SlotPool
from overspill.tiers.checksums import block_checksums
from overspill.tiers.transfer import DamagedBlock

PARTS = ("pool", "pinned", "check", "check-flat", "engine")


@contextlib.contextmanager
def exchanged(original: Any, replacement: Any) -> Iterator[None]:
    """`replacement` wherever a module of overspill has `original` under a name of its own."""
    places = [
        (module, name)
        for key, module in list(sys.modules.items())
        if key.split(".")[0] == "overspill" and module is not None
        for name, value in list(vars(module).items())
        if value is original
    ]
    if not places:
        raise RuntimeError(f"no module of overspill refers to {original}; the part has moved, so this measurement must follow it")
    for module, name in places:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, original)


@contextlib.contextmanager
def without(part: str | None, *, largest_tensor_bytes: int, num_parameters: int) -> Iterator[dict[str, Any]]:
    """Run a session inside with one part switched off; gives the session's extra arguments.

    Args:
        part: one of `PARTS`; None: everything as it is.
        largest_tensor_bytes: of the model's largest parameter, as it is stored.
        num_parameters: for the flat gradient buffer.
    """
    if part is None:
        yield {}
    elif part == "pool":
        with exchanged(Arena, _one_size_arena(largest_tensor_bytes)):
            yield {}
    elif part == "pinned":
        with exchanged(HostMemory, PowerOfTwoMemory):
            yield {}
    elif part in ("check", "check-flat"):
        with exchanged(sum_of_squares, ElementwiseCheck(num_parameters if part == "check-flat" else None)):
            yield {}
    elif part == "engine":
        yield {"open_store": PageCacheStore}
    else:
        raise ValueError(f"{part!r} is not a part; choose one of {', '.join(PARTS)}")


# -- pool ------------------------------------------------------------------------------------------------------------


class _PartOfSlot:
    """A slot of which only the first bytes were asked for."""

    def __init__(self, slot: Any, num_bytes: int) -> None:
        self._slot, self.num_bytes = slot, num_bytes

    @property
    def tensor(self) -> torch.Tensor:
        tensor: torch.Tensor = self._slot.tensor[: self.num_bytes]
        return tensor

    @property
    def after(self) -> Any:
        return self._slot.after

    def release(self, after: Any = ()) -> None:
        self._slot.release(after)


def _one_size_pool(largest_tensor_bytes: int) -> type[SlotPool]:
    class OneSizePool(SlotPool):
        """Slots that are all as large as the largest tensor, as many as the program wants."""

        limit_bytes = property(lambda self: None, lambda self, limit_bytes: None)  # type: ignore[assignment]

        def acquire(self, num_bytes: int) -> Any:
            return _PartOfSlot(super().acquire(max(num_bytes, largest_tensor_bytes)), num_bytes)

    return OneSizePool


def _one_size_arena(largest_tensor_bytes: int) -> Callable[[Any, str], Arena]:
    class OneSizeArena(Arena):
        """No places in one block: all slots from a pool of one size."""

        def __init__(self, memory: Any, name: str) -> None:
            super().__init__(memory, name)
            self.unplanned = _one_size_pool(largest_tensor_bytes)(memory, name)

        def follow(self, places: Any, *, num_bytes: int) -> bool:
            self.leave()
            return False

    def make(memory: Any, name: str, **others: Any) -> Arena:
        # MemAscend's pool, and DeepSpeed's, are host memory; slots on the device stay as they are.
        return OneSizeArena(memory, name) if isinstance(memory, HostMemory) else Arena(memory, name, **others)

    return make


# -- pinned ----------------------------------------------------------------------------------------------------------


class PowerOfTwoMemory(HostMemory):
    """Host memory as `torch.empty(..., pin_memory=True)` gives it. Without CUDA: ordinary memory of the rounded size, touched."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._sizes: dict[str, int] = {}

    @property
    def allocated_bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def peak_bytes(self) -> int:
        return self._most_bytes

    @property
    def pinned_bytes(self) -> int:
        return self.allocated_bytes if torch.cuda.is_available() else 0

    _most_bytes = 0

    def allocate(self, name: str, num_bytes: int, *, pinned: bool = True) -> torch.Tensor:
        rounded = 1 << (num_bytes - 1).bit_length()
        if self.budget_bytes is not None and self.allocated_bytes + rounded > self.budget_bytes:
            raise BudgetError(f"{name} needs {rounded} B after rounding, the host budget of {self.budget_bytes} B leaves less")
        if torch.cuda.is_available():
            # The allocator rounds by itself; touching is its cudaHostAlloc's.
            tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).zero_()
        else:
            tensor = torch.empty(rounded, dtype=torch.uint8).zero_()[:num_bytes]
        self._sizes[name] = rounded
        self._most_bytes = max(self._most_bytes, self.allocated_bytes)
        return tensor

    def free(self, name: str) -> None:
        del self._sizes[name]

    def close(self) -> None:
        self._sizes.clear()


# -- overflow check --------------------------------------------------------------------------------------------------


class ElementwiseCheck:
    """Stands for `sum_of_squares`: the same result, after the check that makes temporaries of the gradient's size.

    Args:
        flat_elements: check all gradients together, once so many elements have come; None: each by itself.
    """

    def __init__(self, flat_elements: int | None) -> None:
        self._flat = None if flat_elements is None else torch.empty(flat_elements, dtype=torch.float32)
        self._num_there = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        gradient = tensor.detach().reshape(-1)
        if self._flat is None:
            self._check(gradient.to("cpu", torch.float32))
        else:
            end = self._num_there + gradient.numel()
            self._flat[self._num_there : end].copy_(gradient)
            self._num_there = end
            if end == self._flat.numel():
                self._check(self._flat)
                self._num_there = 0
        return sum_of_squares(tensor)

    def _check(self, values: torch.Tensor) -> None:
        if bool(torch.isinf(values).any()) or bool(torch.isnan(values).any()):
            raise FloatingPointError("a gradient is not finite")


# -- engine ----------------------------------------------------------------------------------------------------------


class _Copy:
    """A transfer that runs on a thread."""

    def __init__(self, future: Future[tuple[int, ...]]) -> None:
        self._future = future

    @property
    def checksums(self) -> tuple[int, ...]:
        return self._future.result()

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._future.result()


class PageCacheStore:
    """One file an extent, read and written through the page cache by a few Python threads. Meets the protocol `Store`.

    Args:
        directory: on the drive; the files go into a folder of their own, which is emptied and removed in the end.
        capacity_bytes: most bytes of all extents.
        is_scratch: only names the folder.
    """

    def __init__(self, directory: str, capacity_bytes: int, is_scratch: bool) -> None:
        self.capacity_bytes = capacity_bytes
        self.read_bytes = self.written_bytes = 0
        self._folder = Path(directory) / ("buffered-scratch" if is_scratch else "buffered")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, tuple[int, int, Path]] = {}
        """Name -> descriptor, size, path."""
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(4)

    @property
    def allocated_bytes(self) -> int:
        return sum(size for _, size, _ in self._files.values())

    def allocate(self, name: str, num_bytes: int) -> None:
        if self.allocated_bytes + num_bytes > self.capacity_bytes + 4096 * (len(self._files) + 1):
            raise BudgetError(f"{name} needs {num_bytes} B, the files have {self.allocated_bytes} of {self.capacity_bytes} B")
        path = self._folder / f"{len(self._files)}.bin"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(descriptor, num_bytes)
        self._files[name] = (descriptor, num_bytes, path)

    def free(self, name: str) -> None:
        descriptor, _, path = self._files.pop(name)
        os.close(descriptor)
        path.unlink()

    def num_bytes(self, name: str) -> int:
        return self._files[name][1]

    def start_read(self, name: str, offset: int, buffer: torch.Tensor, *, expected: Sequence[int] | None = None) -> _Copy:
        with self._lock:
            self.read_bytes += buffer.numel()

        def read() -> tuple[int, ...]:
            self._move(os.preadv, name, offset, buffer)
            found = block_checksums(buffer) if expected is not None else ()
            wrong = next((block for block, want in enumerate(expected or ()) if found[block] != want), None)
            if expected is not None and wrong is not None:
                raise DamagedBlock(name, wrong, expected[wrong], found[wrong])
            return found

        return _Copy(self._threads.submit(read))

    def start_write(self, name: str, offset: int, buffer: torch.Tensor, *, with_checksums: bool = False) -> _Copy:
        with self._lock:
            self.written_bytes += buffer.numel()

        def write() -> tuple[int, ...]:
            checksums = block_checksums(buffer) if with_checksums else ()
            self._move(os.pwritev, name, offset, buffer)
            return checksums

        return _Copy(self._threads.submit(write))

    def _move(self, call: Callable[[int, list[memoryview], int], int], name: str, offset: int, buffer: torch.Tensor) -> None:
        view, done = memoryview(buffer.numpy()), 0
        while done < len(view):
            moved = call(self._files[name][0], [view[done:]], offset + done)
            if moved == 0:
                raise StorageError(f"{name}: wanted {len(view)} B at {offset}, moved {done} B")
            done += moved

    def interrupt(self) -> None:
        """Nothing here waits for a person."""

    def proceed(self) -> None:
        """Nothing was given up."""

    def close(self) -> None:
        self._threads.shutdown()
        for name in list(self._files):
            self.free(name)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def __enter__(self) -> PageCacheStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
