"""Peak of this process's resident memory above what it holds already. Linux alone: read from, and reset through, /proc."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cluster.bench.values import BenchError

_PROC = Path("/proc/self")
_Result = TypeVar("_Result")


def why_unmeasurable() -> str:
    """Empty where ``peak_above`` works, else the reason, for a note in the place of the figures."""
    try:
        reset_peak()
    except BenchError as error:
        return str(error)
    return ""


def peak_above(work: Callable[[], _Result]) -> tuple[_Result, int]:
    """What ``work`` returns, and the bytes held at its worst beyond those before it. Raises BenchError where the peak cannot be reset or read.

    The system's peak is that of the whole life: without the reset a high import or warm-up of earlier hides that much of the work's own. What earlier
    work freed and the C library kept goes back to the system first, as it would be used again without showing.
    """
    reset_peak()
    before = _bytes_of("VmRSS")
    result = work()
    return result, peak() - before


def peak() -> int:
    """Bytes held at the worst since ``reset_peak``."""
    return _bytes_of("VmHWM")


def reset_peak() -> None:
    """Give back what is free, then forget the peak so far. Raises BenchError where the system does not allow it."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")  # VmHWM becomes VmRSS
        peak()
    except OSError as error:
        raise BenchError(f"peak memory is read from Linux's /proc, which does not allow it here ({error})") from error


def _bytes_of(field: str) -> int:
    for line in (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"peak memory is read from Linux's /proc, whose status has no {field} here")
