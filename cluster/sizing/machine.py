"""What a machine has: processors, memory, shared memory and GPUs. Read without torch, in milliseconds."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
SHARED = Path("/dev/shm")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_ASK_S = 20.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as nvidia-smi describes it."""

    name: str
    gib: float  # 0 where the driver gives no number
    driver: str


@dataclass(frozen=True, slots=True)
class Machine:
    """``named``: by the user, who said only what GPUs it has; its memory is then taken as endless."""

    cpus: int
    memory_gib: float
    shared_gib: float
    gpus: int
    gpu_gib: float  # of the smallest; 0 without one, and where it is unknown
    named: bool = False

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU{'s' if self.gpus != 1 else ''}"
        gpus += f" of {self.gpu_gib:g} GiB" if self.gpus and self.gpu_gib else ""
        if self.named:
            return gpus
        return f"{self.cpus} CPUs, {self.memory_gib:.1f} GiB of memory and {gpus}"


def named_machine(gpus: int, gpu_gib: float) -> Machine:
    """A machine of which only the GPUs are known."""
    return Machine(0, math.inf, math.inf, gpus, gpu_gib, named=True)


def this_machine() -> Machine:
    """The machine of this process, within the limits of its container."""
    found = find_gpus()
    shared = shutil.disk_usage(SHARED).total / GIB if SHARED.is_dir() else 0.0
    smallest = min((gpu.gib for gpu in found), default=0.0)
    return Machine(len(os.sched_getaffinity(0)), memory_gib(), shared, len(found), round(smallest, 1))


def memory_gib() -> float:
    """Memory of this machine, or of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in _LIMITS:
        try:
            limit = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdecimal():
            total = min(total, int(limit))
    return total / GIB


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves; none where there is no driver."""
    fields = "name,memory.total,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    # Other lines are messages ("No devices were found"); a GPU that shares the host's memory says "[N/A]".
    rows = [row for line in answer.stdout.splitlines() if len(row := line.strip().rsplit(", ", 2)) == 3]
    found = tuple(
        Gpu(name, int(mib) / 1024 if mib.isdecimal() else 0.0, driver) for name, mib, driver in rows
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return found[: len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])]


def packed(shares: Sequence[float]) -> list[list[int]]:
    """GPUs, each as the indices of the ``shares`` on it: the first with room, as Ray splits none over two."""
    gpus: list[list[int]] = []
    for index, share in enumerate(shares):
        if share:
            rooms = (on for on in gpus if sum(shares[other] for other in on) + share <= 1 + 1e-9)
            if (on := next(rooms, None)) is None:
                gpus.append(on := [])
            on.append(index)
    return gpus
