"""Peak of this process's resident memory above what it holds already (actors/peak_memory.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from actors.peak_memory import UnmeasurableError, reset_resident_peak, resident, resident_peak
from cluster.bench.values import BenchError

_Result = TypeVar("_Result")


def why_unmeasurable() -> str:
    """Empty where ``peak_above`` works, else the reason, for a note in the place of the figures."""
    try:
        reset_resident_peak()
    except UnmeasurableError as error:
        return str(error)
    return ""


def peak_above(work: Callable[[], _Result]) -> tuple[_Result, int]:
    """What ``work`` returns, and the bytes held at its worst beyond those before it. Raises BenchError where the peak cannot be reset or read.

    What earlier work freed and the C library kept goes back to the system first, as it would be used again without showing.
    """
    reset_peak()
    before = resident()
    result = work()
    return result, peak() - before


def peak() -> int:
    """Bytes held at the worst since ``reset_peak``."""
    try:
        return resident_peak()
    except UnmeasurableError as error:
        raise BenchError(str(error)) from error


def reset_peak() -> None:
    """Raises BenchError where the system does not allow it."""
    try:
        reset_resident_peak()
    except UnmeasurableError as error:
        raise BenchError(str(error)) from error
