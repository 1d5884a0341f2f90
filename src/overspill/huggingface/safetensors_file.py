"""The safetensors format, tensor by tensor, without a memory map.

A file is: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, [begin, end) in the data), the data.
The library maps files, and mapped pages that were touched count as resident until the map goes. Here every tensor is
read with `pread` into memory of its own, so that resident memory is what the caller holds, and written the same way.

Rule 1. A header is believed only after its ranges were held against dtype, shape and file size: a truncated or damaged
        file is found before its first tensor is read.
Rule 2. Pages that were read or flushed are dropped from the page cache: a model passes through once.
Rule 3. Every failure of a read or a write is a `StorageError` with path, offset, bytes wanted and done.

Source: the safetensors format description (header limit 100 MB, data aligned to 8 bytes by padding the header with blanks).
Limits: only dtypes that torch has; `F4`, `F6` and the like are refused by name.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from overspill.errors import ModelFolderError, StorageError
from overspill.units import MIB, format_bytes

HEADER_LIMIT_BYTES = 100_000_000
"""Largest header that the reference implementation accepts."""

_IO_BYTES = 8 * MIB
"""Bytes of one write and of one checksum step: small enough to stay in cache. Chosen, not tuned."""

_OWN_MAPPING_BYTES = MIB
"""Smallest tensor that gets a mapping of its own. Chosen, not tuned."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FORMAT_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file."""

    name: str
    dtype: str
    """Of the format: a key of `TORCH_DTYPES`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of its first byte in the file."""
    num_bytes: int


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        ModelFolderError: no safetensors file, truncated, or with ranges that do not fit dtype and shape (rule 1).
        StorageError: the file cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > HEADER_LIMIT_BYTES or 8 + length > size:
                raise ModelFolderError(f"{path} is no complete safetensors file: {size} B, header of {length} B announced; copy it again")
            text = file.read(length)
    except OSError as error:
        raise StorageError(f"cannot read the header of {path}: {error.strerror} (errno {error.errno})") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_stored_tensor(name, entry, path, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(f"the header of {path} is damaged ({error}); copy the file again") from error
    tensors.sort(key=lambda tensor: tensor.offset)
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise ModelFolderError(f"{path} is damaged: {tensor.name} starts at byte {tensor.offset}, expected {end}; copy the file again")
        end += tensor.num_bytes
    if end != size:
        state = "truncated" if size < end else "too long"
        raise ModelFolderError(f"{path} is {state}: its header needs {end} B, the file has {size} B; copy it again")
    return tensors


def _stored_tensor(name: str, entry: Mapping, path: Path, data_start: int) -> StoredTensor:
    if entry["dtype"] not in TORCH_DTYPES:
        raise ModelFolderError(f"{name} in {path} has dtype {entry['dtype']}, which torch cannot hold; use a full-precision checkpoint")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(not isinstance(value, int) or value < 0 for value in (begin, end, *shape)):
        raise ValueError(f"{name} has shape {shape} at [{begin}, {end})")
    wanted = math.prod(shape) * TORCH_DTYPES[entry["dtype"]].itemsize
    if end - begin != wanted:
        raise ValueError(f"{name} of shape {shape} and dtype {entry['dtype']} takes {wanted} B, its range has {end - begin} B")
    return StoredTensor(name=name, dtype=entry["dtype"], shape=shape, path=path, offset=data_start + begin, num_bytes=wanted)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """An open safetensors file that tensors are read from; a context manager that owns the descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror} (errno {error.errno})") from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """A new CPU tensor with the bytes of `stored`, which lies in this file."""
        tensor = _allocate(stored)
        view = as_bytes(tensor) if stored.num_bytes else memoryview(b"")
        done = 0
        while done < stored.num_bytes:
            try:
                got = os.preadv(self._descriptor, [view[done:]], stored.offset + done)
            except OSError as error:
                raise StorageError(self._failure(stored, done, f"{error.strerror}, errno {error.errno}")) from error
            if got == 0:
                raise StorageError(self._failure(stored, done, "end of file"))
            done += got
        os.posix_fadvise(self._descriptor, stored.offset, stored.num_bytes, os.POSIX_FADV_DONTNEED)
        return tensor

    def _failure(self, stored: StoredTensor, done: int, reason: str) -> str:
        return f"short read of {stored.name}: wanted {stored.num_bytes} B at offset {stored.offset} of {self.path}, got {done} B ({reason})"


def _allocate(stored: StoredTensor) -> torch.Tensor:
    """Memory for `stored` that returns to the system when the tensor goes; malloc would keep some tens of MB for later."""
    dtype = TORCH_DTYPES[stored.dtype]
    if stored.num_bytes < _OWN_MAPPING_BYTES:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, stored.num_bytes), dtype=dtype).view(stored.shape)


def build_header(entries: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> bytes:
    """The header of a file that holds `entries` (name, shape, dtype) in this order, its length included."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in entries:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": FORMAT_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFileWriter:
    """Writes a safetensors file front to back; a context manager. The bytes are durable when the block has ended well."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self._offset = 0
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"cannot create {path}: {error.strerror} (errno {error.errno})") from error
        try:
            self._write("header", memoryview(header))
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        try:
            if exc_type is None:
                os.fsync(self._descriptor)
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that reading back reads the drive
        except OSError as error:
            raise StorageError(f"cannot flush {self.path} ({self._offset} B): {error.strerror} (errno {error.errno})") from error
        finally:
            os.close(self._descriptor)

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Append a contiguous CPU tensor; returns the checksum of its bytes."""
        return self._write(name, as_bytes(tensor)) if tensor.numel() else 0

    def _write(self, name: str, view: memoryview) -> int:
        checksum = 0
        done = 0
        while done < len(view):
            block = view[done : done + _IO_BYTES]
            try:
                written = os.write(self._descriptor, block)
            except OSError as error:
                full = f"; {format_bytes(_free_bytes(self.path))} are free there, make room" if error.errno == errno.ENOSPC else ""
                raise StorageError(
                    f"short write of {name}: wanted {len(view)} B at offset {self._offset} of {self.path}, "
                    f"wrote {done} B ({error.strerror}, errno {error.errno}){full}"
                ) from error
            checksum = zlib.crc32(block[:written], checksum)
            done += written
        self._offset += done
        return checksum


def checksum_of(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes: what `TensorFileWriter.write` returned for it."""
    return zlib.crc32(as_bytes(tensor.contiguous())) if tensor.numel() else 0


def _free_bytes(path: Path) -> int:
    stats = os.statvfs(path.parent)
    return stats.f_bavail * stats.f_frsize
