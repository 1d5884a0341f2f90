"""Clock, power and temperature of the device beside each step, so that the noise of steps can be understood afterwards.

By NVML, through ctypes, as torch finds out about devices itself; where anything of it is not there, nothing is said and nothing fails. A
reading takes some microseconds to some hundred, between steps.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

SM_CLOCK, GPU_TEMPERATURE = 1, 0
"""NVML_CLOCK_SM, NVML_TEMPERATURE_GPU."""


class GpuState:
    """Of one CUDA device; of any other nothing is known."""

    def __init__(self, device: torch.device) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # whatever it is, steps can be timed without
                self._library = _open(str(torch.cuda.get_device_properties(device).uuid), self._handle)

    def read(self) -> dict[str, float]:
        """`sm_mhz`, `watts`, `celsius`, and why the clock is held down (`throttle`, NVML's bits); what is not known is not there."""
        if self._library is None:
            return {}
        found: dict[str, float] = {}
        for name, call, before, kind, scale in (
            ("sm_mhz", "nvmlDeviceGetClockInfo", (SM_CLOCK,), ctypes.c_uint, 1.0),
            ("watts", "nvmlDeviceGetPowerUsage", (), ctypes.c_uint, 1e-3),
            ("celsius", "nvmlDeviceGetTemperature", (GPU_TEMPERATURE,), ctypes.c_uint, 1.0),
            ("throttle", "nvmlDeviceGetCurrentClocksThrottleReasons", (), ctypes.c_ulonglong, 1.0),
        ):
            value = kind()
            try:
                status = getattr(self._library, call)(self._handle, *map(ctypes.c_int, before), ctypes.byref(value))
            except (AttributeError, OSError, ctypes.ArgumentError):
                continue
            if status == 0:
                found[name] = round(value.value * scale, 1)
        return found


def _open(uuid: str, handle: ctypes.c_void_p) -> Any:
    """The library, with the handle filled in; None: it does not know the device."""
    library = ctypes.CDLL("libnvidia-ml.so.1")
    if library.nvmlInit_v2() != 0:
        return None
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return library if library.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(name.encode()), ctypes.byref(handle)) == 0 else None
