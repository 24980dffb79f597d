"""Whether a run fits a machine: its processes laid onto GPUs and memory, and each shortage with its cure.

RunConfig, ModelShape --> memory.py --> processes --laid onto--> Machine --> Plan: lines, shortages
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from cluster.sizing.machine import Machine, packed
from cluster.sizing.memory import (
    CONTEXT_GIB,
    EMPTY_GIB,
    GIB,
    Part,
    cache_tokens,
    learner_parts,
    object_store_gib,
    peak,
    published_bytes,
    refresh_seconds,
    store_bytes,
    worker_parts,
)
from configs.schema import RunConfig
from configs.shapes import ModelShape

COMPILE_S = 900.0  # vLLM compiles and captures graphs when it starts on a GPU: give it so long
FRAGMENTS = 0.05  # of a GPU: what its allocators cannot use
SHARED_BYTES = 10**10  # an object store above it must fit into /dev/shm, or Ray refuses to start
_DRIVER_GIB = 1.0  # of the driver's process, and as much of Ray's own


@dataclass(frozen=True, slots=True)
class Process:
    """One kind of process. ``gpu``: the part of a GPU that each asks for, 0 on a CPU."""

    name: str
    count: int
    gpu: float
    parts: tuple[Part, ...]

    @property
    def gib(self) -> float:
        """At its peak, with what libraries take on its device."""
        return peak(self.parts) / GIB + self._libraries_gib

    @property
    def _libraries_gib(self) -> float:
        return CONTEXT_GIB if self.gpu else EMPTY_GIB

    def lines(self) -> Iterator[tuple[str, str]]:
        """What each holds, then what it holds for a moment beside it."""
        where = "GPU" if self.gpu else "CPU"
        yield (
            f"{self.name} x{self.count}",
            f"{self.gib:6.1f} GiB each, on {where}: {self._named(passing=False)}, "
            f"libraries {self._libraries_gib:.1f}",
        )
        yield "", f"           at the peak also {self._named(passing=True)}"

    def _named(self, passing: bool) -> str:
        parts = (part for part in self.parts if _shown(part, passing))
        return (" or " if passing else ", ").join(f"{part.name} {part.bytes / GIB:.1f}" for part in parts)


def _shown(part: Part, passing: bool) -> bool:
    return part.passing == passing and abs(part.bytes) >= 0.05 * GIB


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run takes of a machine. ``lines``: name and text; ``shortages``: what would stop it."""

    title: str
    lines: tuple[tuple[str, str], ...]
    shortages: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        rows = [f"{name:{width}s}  {text}" for name, text in self.lines]
        ends = [f"short: {shortage}" for shortage in self.shortages] or ["it fits, by this arithmetic"]
        return "\n".join([self.title, *rows, *ends])


def make_plan(config: RunConfig, shape: ModelShape, machine: Machine) -> Plan:
    """Lay the processes of a training onto ``machine``."""
    processes = _processes(config, shape, machine)
    gpus = _placed(processes)
    size = f"{shape.parameters / 1e6:,.0f} million parameters, {config.model.dtype}"
    lines = [
        *(line for process in processes for line in process.lines()),
        *_loads(gpus, machine),
        ("object store", _store_line(config, shape)),
        *_slow_store_lines(config, shape, machine),
        ("host memory", _host_line(_host_gib(processes, config, shape), machine)),
        ("refresh", _refresh_line(config, shape)),
        *_episode_lines(processes, config, shape),
    ]
    shortages = (
        *_gpu_shortages(processes, gpus, config, machine),
        *_cache_shortages(processes, config, shape, machine),
        *_host_shortages(processes, config, shape, machine),
        *_limits(config, shape),
    )
    return Plan(f"{config.name}: {config.model.name} ({size}) on {machine}", tuple(lines), shortages)


def _processes(config: RunConfig, shape: ModelShape, machine: Machine) -> tuple[Process, ...]:
    rollout, learner = config.rollout, config.learner
    gib = machine.gpu_gib if rollout.gpus_per_worker else 0.0
    ranks = learner_parts(shape, learner, config.objective.kl_coefficient > 0)
    return (
        Process("learner", learner.workers, learner.gpus_per_worker, ranks),
        Process("worker", rollout.workers, rollout.gpus_per_worker, worker_parts(shape, config, gib)),
    )


def _placed(processes: tuple[Process, ...]) -> list[list[Process]]:
    """Processes by GPU: all that they need, which may be more than the machine has."""
    each = [process for process in processes for _ in range(process.count)]
    return [[each[index] for index in on] for on in packed([process.gpu for process in each])]


# --- lines ------------------------------------------------------------------------------------------------


def _loads(gpus: list[list[Process]], machine: Machine) -> Iterator[tuple[str, str]]:
    """A line for each row of the machine's GPUs that hold the same."""
    known = gpus[: machine.gpus] if machine.gpu_gib else []
    for _, row in groupby(enumerate(known), key=lambda pair: [process.name for process in pair[1]]):
        numbers, same = zip(*row, strict=True)
        each = " + ".join(f"{process.name} {process.gib:.1f}" for process in same[0])
        name = f"GPU {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")
        gib = sum(process.gib for process in same[0])
        yield name, f"{gib:6.1f} of {machine.gpu_gib:g} GiB at the peak: {each}"


def _store_line(config: RunConfig, shape: ModelShape) -> str:
    weights, episodes = store_bytes(shape, config)
    size = object_store_gib(config, shape)
    return (
        f"{size:6.1f} GiB, needed {(weights + episodes) / GIB:.1f}: two versions of the weights "
        f"{weights / GIB:.1f}, the B of waiting episodes {episodes / GIB:.1f}"
    )


def _slow_store_lines(config: RunConfig, shape: ModelShape, machine: Machine) -> Iterator[tuple[str, str]]:
    """A note where Ray starts all the same."""
    size = object_store_gib(config, shape)
    if not config.ray.address and machine.shared_gib < size <= SHARED_BYTES / GIB:
        yield (
            "",
            f"    slow: /dev/shm has {machine.shared_gib:.1f} GiB, so Ray keeps it in its temporary folder "
            "(a container takes --shm-size)",
        )


def _refresh_line(config: RunConfig, shape: ModelShape) -> str:
    """How long, by which way, and why by this one."""
    seconds = refresh_seconds(shape, config)
    if config.learner.weight_transfer == "object_store":
        return f"{seconds:6.1f} s, about, for new weights into a worker, through Ray's object store"
    backend = config.transfer_backend
    on_gpu = backend == "nccl"
    name, why = ("NCCL", "both sides have GPUs") if on_gpu else ("gloo", "not both sides have GPUs")
    return (
        f"{seconds:6.1f} s at most, through Ray's object store; less by the broadcast before it "
        f"({name}, as {why}){', which has not run on a GPU yet' if on_gpu else ''}"
    )


def _host_line(gib: float, machine: Machine) -> str:
    has = "" if machine.named else f" of {machine.memory_gib:.1f}"
    return f"{gib:6.1f}{has} GiB: processes, object store, driver and Ray"


def _episode_lines(
    processes: tuple[Process, ...], config: RunConfig, shape: ModelShape
) -> Iterator[tuple[str, str]]:
    slots = config.engine.slots * config.rollout.workers
    yield "episodes", f"{slots:6d} in flight (engine.slots x rollout.workers)"
    tokens = cache_tokens(shape, config, _cache(processes[1]))
    context = config.memory.max_context_tokens + config.memory.max_extract_tokens
    yield "", f"{tokens:,} tokens in a worker's KV cache: {tokens // context} full contexts of {context}"


def _cache(worker: Process) -> float:
    return next(part.bytes for part in worker.parts if part.name == "kv cache")


def _host_gib(processes: tuple[Process, ...], config: RunConfig, shape: ModelShape) -> float:
    """Of the processes on GPUs only their libraries, and rank 0's copy of the weights that it publishes.

    With learner.weight_transfer=collective each worker holds a copy too, until it loads it.
    """
    gib = sum(process.count * (EMPTY_GIB if process.gpu else process.gib) for process in processes)
    published = published_bytes(shape, config.learner) / GIB
    copies = published if processes[0].gpu else 0.0
    received = config.rollout.workers * published if config.learner.weight_transfer == "collective" else 0.0
    return gib + copies + received + object_store_gib(config, shape) + 2 * _DRIVER_GIB


# --- shortages --------------------------------------------------------------------------------------------


def _gpu_shortages(
    processes: tuple[Process, ...], gpus: list[list[Process]], config: RunConfig, machine: Machine
) -> Iterator[str]:
    if len(gpus) > machine.gpus:
        asked = sum(process.count * process.gpu for process in processes)
        said = f"the run asks for {asked:g} GPU{'s' if asked != 1 else ''}"
        if asked <= machine.gpus:
            said = f"these shares need {len(gpus)} GPUs, as none is split over two"
        cure = "lower rollout.workers, learner.workers or their gpus_per_worker"
        if not machine.gpus:
            cure = "name the machine that is to run it: engram plan --gpus N --gpu-gib GIB; "
            cure += "for this one: rollout.gpus_per_worker=0 learner.gpus_per_worker=0"
        yield f"{said}, there are {machine.gpus}; {cure}"
    if not machine.gpu_gib:
        if gpus and machine.gpus:
            yield (
                "nvidia-smi gives no memory size of this machine's GPUs; name it: "
                f"engram plan --gpus {machine.gpus} --gpu-gib GIB"
            )
        return
    seen: set[tuple[str, ...]] = set()
    room = machine.gpu_gib * (1 - FRAGMENTS)
    for number, on in enumerate(gpus[: machine.gpus]):
        need, names = sum(process.gib for process in on), tuple(process.name for process in on)
        if need > room and names not in seen:
            seen.add(names)  # eight GPUs with the same load are one shortage
            free = machine.gpus > len(gpus)
            cure = " or ".join(_cure(process, config, process.gib - (need - room), free) for process in on)
            yield (
                f"GPU {number} needs {need:.1f} GiB and has {machine.gpu_gib:g}, less {FRAGMENTS:.0%} for "
                f"fragments; {cure}"
            )


def _cure(process: Process, config: RunConfig, room: float, free: bool) -> str:
    """What makes ``process`` smaller. ``room``: GiB that there are for it; ``free``: a GPU has no process."""
    learner = config.learner
    if process.name == "worker":
        sized = config.engine.kv_cache_gib is not None
        return f"lower engine.{'kv_cache_gib' if sized else 'gpu_memory_utilization'}"
    without_pass = tuple(part for part in process.parts if part.name != "activations")
    if peak(without_pass) / GIB + CONTEXT_GIB < room:
        checkpoints = "" if learner.gradient_checkpointing else "learner.gradient_checkpointing=true, "
        return f"{checkpoints}a smaller learner.microbatch_tokens"
    cures = [_fewer_trained(config), "a smaller model"]
    if free:
        cures.insert(
            1, f"more learner.workers{'' if learner.zero_stage == 3 else ' with learner.zero_stage=3'}"
        )
    elif learner.workers > 1 and learner.zero_stage < 3:
        cures.insert(1, "learner.zero_stage=3")
    return ", ".join(filter(None, cures))


def _fewer_trained(config: RunConfig) -> str:
    """The settings that train less than now; "" where none does."""
    less = {"full": "learner.trainable=lora or last_layers", "last_layers": "learner.trainable=lora"}
    return less.get(config.learner.trainable, "")


def _cache_shortages(
    processes: tuple[Process, ...], config: RunConfig, shape: ModelShape, machine: Machine
) -> Iterator[str]:
    on_gpu = processes[1].gpu and config.engine.kv_cache_gib is None
    if on_gpu and machine.gpus and not machine.gpu_gib:
        return  # the cache is a part of a memory that is unknown
    tokens, longest = cache_tokens(shape, config, _cache(processes[1])), config.engine.max_model_tokens
    if tokens < longest:
        setting = f"engine.{'gpu_memory_utilization' if on_gpu else 'kv_cache_gib'}"
        yield (
            f"the KV cache holds {tokens:,} tokens, fewer than engine.max_model_tokens={longest}; "
            f"raise {setting}, or lower engine.max_model_tokens"
        )


def _host_shortages(
    processes: tuple[Process, ...], config: RunConfig, shape: ModelShape, machine: Machine
) -> Iterator[str]:
    if config.ray.address:  # a cluster: its nodes are not this machine
        return
    size, needed = object_store_gib(config, shape), sum(store_bytes(shape, config)) / GIB
    if size < needed:
        yield (
            f"ray.object_store_gib={size:g} is less than the {needed:.1f} GiB that a step needs, and Ray "
            f"writes the rest to disk; set ray.object_store_gib=null, or {math.ceil(needed)}"
        )
    if size > max(machine.shared_gib, SHARED_BYTES / GIB):
        yield (
            f"the object store of {size:.1f} GiB does not fit into /dev/shm ({machine.shared_gib:.1f} GiB); "
            "give the container more (--shm-size), or lower train.tasks_per_step or ray.object_store_gib"
        )
    gib = _host_gib(processes, config, shape)
    if gib > machine.memory_gib:
        largest = max(processes, key=lambda process: 0 if process.gpu else process.gib * process.count)
        cure = "rollout.workers or engine.kv_cache_gib"
        if largest.name == "learner":
            fewer = _fewer_trained(config)
            ranks = " or learner.workers" if config.learner.workers > 1 else ""
            cure = f"learner.microbatch_tokens{ranks}{f', or set {fewer}' if fewer else ''}"
        yield f"the run needs {gib:.1f} GiB of memory, there are {machine.memory_gib:.1f}; lower {cure}"


def _limits(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """What is not memory, and would stop the run all the same."""
    longest, window = config.engine.max_model_tokens, shape.max_positions
    if longest > window:
        yield f"engine.max_model_tokens={longest} is more than the model's window of {window}; lower it"
    if config.rollout.gpus_per_worker and config.ray.startup_timeout_s < COMPILE_S:
        yield (
            f"ray.startup_timeout_s={config.ray.startup_timeout_s:g} is short for an engine that compiles "
            f"on a GPU; set {COMPILE_S:g}"
        )
