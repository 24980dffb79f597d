"""Measures the most memory that this process held: resident, by Linux's /proc, and on the GPU, by torch.

The system's peak is that of the whole life of the process, so it is reset first. Otherwise an early import or
warm-up would hide what comes later.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")
_REFUSED = "peak memory is read from Linux's /proc, which does not allow it here ({})"


class UnmeasurableError(RuntimeError):
    """The system does not let this process read or reset its peak. The message says why."""


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The highest number of bytes held.

    resident_bytes: None where it cannot be measured; ``problem`` then says why. device_bytes: 0 without a
    GPU. Both include what the engine reserves ahead (its key-value cache), used or not. So compare only rows
    that ran on engines of one configuration.
    """

    resident_bytes: int | None
    device_bytes: int
    problem: str


def take_peak() -> PeakMemory:
    """The peaks since the last call, or since the process started. Forgets them."""
    device = 0
    torch = sys.modules.get("torch")  # a library that is not imported holds nothing
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    try:
        resident = resident_peak()
        reset_resident_peak()
    except UnmeasurableError as error:
        return PeakMemory(None, device, str(error))
    return PeakMemory(resident, device, "")


def resident_peak() -> int:
    """The most bytes resident since ``reset_resident_peak``, or since the start. Raises UnmeasurableError."""
    return _bytes_of("VmHWM")


def resident() -> int:
    """Bytes resident now. Raises UnmeasurableError."""
    return _bytes_of("VmRSS")


def reset_resident_peak() -> None:
    """Give free memory back to the system, then forget the peak so far. Raises UnmeasurableError."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # only glibc has it
        trim(0)
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")  # VmHWM becomes VmRSS
    except OSError as error:
        raise UnmeasurableError(_REFUSED.format(error)) from error
    resident_peak()


def _bytes_of(field: str) -> int:
    try:
        lines = (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise UnmeasurableError(_REFUSED.format(error)) from error
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise UnmeasurableError(f"peak memory is read from Linux's /proc, whose status has no {field} here")
