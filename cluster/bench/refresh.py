"""The path of a new theta from the learner's memory into a serving engine.

    learner (DeepSpeed, Ray actor) --publish--> object store --fetch--> this process --load--> vLLM engine
                                                                                       pause: it serves nobody

The path is the run's own: LearnerGroup, ObjectStoreChannel, VLLMPolicy.refresh. The baseline is torch's copy
of the same tensors to memory that was touched before. Seconds are wall seconds, as three processes take part.
The first refreshes of a run write to memory that nobody has touched, which the system must clear page by
page; the table shows the first one beside the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.engine.policy import VLLMPolicy
from actors.engine.start import model_of
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.types import AdapterKey, Sampling
from cluster.bench.harness import in_turns, timed
from cluster.bench.values import Case, Context, Goal, Outcome, Timing
from cluster.fleet.broadcast import ObjectStoreChannel, ObjectStoreWeights
from cluster.fleet.ray_runtime import Demand, ray_runtime
from cluster.measure.report import Table
from configs.schema import (
    EngineConfig,
    FastWeightsConfig,
    LearnerConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
)
from learner.worker import LearnerGroup, LearnerSpec

GOAL = Goal("at most", 10)
TRAINED_LAYERS = 8
FETCH_S = 300.0
PARTS = ("publish", "fetch", "load", "total")  # of Stages


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of one refresh. ``load`` is the engine's pause."""

    publish: float
    fetch: float
    load: float

    @property
    def total(self) -> float:
        return self.publish + self.fetch + self.load


@dataclass(frozen=True, slots=True)
class Way:
    """Refreshes with all weights, or with those that training changes. ``parts``: median seconds by stage."""

    name: str
    mib: float
    seconds: tuple[float, ...]
    memcpy_s: tuple[float, ...]
    parts: Mapping[str, float]

    @property
    def memcpy(self) -> float:
        return float(np.median(self.memcpy_s))


class Seam:
    """Learner and engine with the same theta.

    ``stages``: of every refresh, in order, by ``trainable_only``.
    """

    def __init__(self, learner: LearnerGroup, policy: VLLMPolicy) -> None:
        self._learner, self._policy = learner, policy
        # As in a run, the version before stays in the store while the next is published.
        self._served: ObjectStoreWeights | None = None
        self.stages: dict[bool, list[Stages]] = {False: [], True: []}

    def refresh(self, trainable_only: bool) -> Timing:
        """Publish, fetch and load; then sample one token, to see that the engine serves."""
        cpu, began = time.process_time(), time.perf_counter()
        weights = ObjectStoreChannel(trainable_only).publish(self._learner)
        published = time.perf_counter()
        tensors = weights.fetch(FETCH_S)
        fetched = time.perf_counter()
        asyncio.run(self._policy.refresh(self._policy.version + 1, tensors, weights.complete))
        loaded, cpu = time.perf_counter(), time.process_time() - cpu
        self._served = weights
        self.stages[trainable_only].append(Stages(published - began, fetched - published, loaded - fetched))
        sampling, adapter = Sampling(0.0, 1, 0, kind="act"), AdapterKey(self._policy.version, "", 0)
        asyncio.run(self._policy.generate([1, 2, 3], sampling, adapter))
        return Timing(loaded - began, cpu)

    def copies(self, trainable_only: bool) -> Mapping[str, Tensor]:
        """A publication's tensors, copied to memory of this process."""
        fetched = ObjectStoreChannel(trainable_only).publish(self._learner).fetch(FETCH_S)
        return {name: tensor.clone() for name, tensor in fetched.items()}

    def packing_s(self, tensors: Mapping[str, Tensor]) -> float:
        """Seconds of vLLM's own packing of all matrices that it packs, alone; 0 where it packs none."""
        seconds: float = self._policy._loop.call(partial(_packing_s, tensors=tensors), "other").result()
        return seconds


def run(context: Context) -> Outcome:
    with _seam(context) as seam:
        for _ in range(1 if context.quick else 6):  # until the object store has used all of its memory
            seam.refresh(False)
        first = seam.stages[False][0]
        seam.stages[False].clear()
        tensors, changed = seam.copies(False), seam.copies(True)
        works: dict[str, Callable[[], Timing]] = {
            "memcpy": partial(timed, _memcpy(tensors)),
            "all": partial(seam.refresh, False),
            "memcpy changed": partial(timed, _memcpy(changed)),
            "changed": partial(seam.refresh, True),
        }
        timings = in_turns(works, context.repeats)
        packing = float(np.median([seam.packing_s(tensors) for _ in range(3)]))
    walls = {name: tuple(timing.wall_s for timing in taken) for name, taken in timings.items()}

    def way(name: str, memcpy: str, published: Mapping[str, Tensor], trainable_only: bool) -> Way:
        mib = sum(tensor.nbytes for tensor in published.values()) / 2**20
        stages = seam.stages[trainable_only][1:]  # without the warm-up
        return Way(name, mib, walls[name], walls[memcpy], _medians(stages))

    whole = way("all", "memcpy", tensors, False)
    return _outcome(whole, way("changed", "memcpy changed", changed, True), first, packing)


def _outcome(whole: Way, changed: Way, first: Stages, packing: float) -> Outcome:
    floor = 1 + packing / whole.memcpy
    note = (
        f"floor {floor:.1f}: one copy into shared memory, "
        "and vLLM's packing of the matrices that it keeps packed, alone"
    )
    copied, last_layers = f"memcpy of {whole.mib:.0f} MiB", f"{changed.mib:.0f} MiB: the last layers"
    exact = "exact, as the others never change; it is what learner.trainable=last_layers publishes"
    cases = (
        Case(
            "all weights",
            copied,
            "publish + fetch + load",
            "s",
            whole.memcpy_s,
            whole.seconds,
            "candidate/baseline",
            GOAL,
            note,
        ),
        Case(
            "changed tensors only",
            "all weights",
            last_layers,
            "s",
            whole.seconds,
            changed.seconds,
            "baseline/candidate",
            None,
            exact,
        ),
    )
    rows = [_row(f"{way.name}, {way.mib:.0f} MiB", way.parts, way.memcpy) for way in (whole, changed)]
    rows.append(_row("all, the first of a run", _medians([first]), whole.memcpy))
    table = Table(
        "Seconds of a refresh by stage (times memcpy of the same bytes); the engine pauses for the load only",
        ("weights", *PARTS),
        tuple(rows),
    )
    ways = (whole, changed)
    figures = {f"{way.name}_{part}_s": seconds for way in ways for part, seconds in way.parts.items()}
    figures |= {f"{way.name}_pause_over_memcpy": way.parts["load"] / way.memcpy for way in ways}
    figures |= {
        "memcpy_s": whole.memcpy,
        "packing_s": packing,
        "floor_over_memcpy": floor,
        "first_publish_s": first.publish,
    }
    return Outcome(cases, (table,), (), figures)


def _medians(stages: Sequence[Stages]) -> dict[str, float]:
    return {part: float(np.median([getattr(refresh, part) for refresh in stages])) for part in PARTS}


def _row(name: str, parts: Mapping[str, float], memcpy: float) -> tuple[str, ...]:
    return (name, *(f"{parts[part]:.3f} ({parts[part] / memcpy:.1f}x)" for part in PARTS))


@contextmanager
def _seam(context: Context) -> Iterator[Seam]:
    from transformers import AutoConfig

    path, threads = context.model_path, context.threads
    layers = AutoConfig.from_pretrained(path).num_hidden_layers
    trained = min(TRAINED_LAYERS, layers // 2)
    config = LearnerConfig(threads=threads, trainable="last_layers", trainable_layers=trained)
    basis = compute_basis_from_checkpoint(path, FastWeightsConfig(basis="random"), seed=0)
    engine = EngineConfig(slots=4, max_model_tokens=256, kv_cache_gib=0.25, receipts="off")
    whole = RunConfig(learner=config)
    with ray_runtime(whole, Demand(cpus=config.cpus_per_worker, gpus=0)):
        spec = LearnerSpec(config, ObjectiveConfig(), str(path), basis, seed=0, temperature=1.0)
        learner = LearnerGroup(spec, whole.ray.startup_timeout_s)
        policy = VLLMPolicy(path, ModelConfig(dtype="float32"), engine, basis, (), 0, threads, seed=0)
        yield Seam(learner, policy)
        policy.close()
        learner.close()


def _memcpy(tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """torch's copy of each tensor to memory that was written before."""
    targets = {name: tensor.clone() for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)

    return copy


def _packing_s(engine: Any, tensors: Mapping[str, Tensor]) -> float:
    """Pack on the engine's step thread, with its threads. The packed matrices are thrown away."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from actors.engine.vllm_internals.tensors import find_places

    plain = nn.functional.linear
    seconds = 0.0
    for place in find_places(model_of(engine)):
        owners = [owner for owner in place.owners if getattr(owner, "cpu_linear", plain) is not plain]
        if place.leaf != "weight" or not owners:
            continue
        shell: Any = nn.Module()
        shell.weight = nn.Parameter(torch.cat([tensors[name] for name in place.parts]), requires_grad=False)
        began = time.perf_counter()
        dispatch_cpu_unquantized_gemm(shell, remove_weight=True)
        seconds += time.perf_counter() - began
    return seconds
