"""A new theta from the learner's memory into a serving engine, against torch's copy of the same tensors to memory that was touched before.

    learner (DeepSpeed, Ray actor) --publish--> object store --fetch--> this process --load--> vLLM engine
                                                                                       pause: it serves nobody meanwhile

The path is the run's own: LearnerGroup, ObjectStoreChannel, VLLMPolicy.refresh. Seconds are wall seconds, as three processes take part. The first
refreshes of a run write to memory that nobody has touched, which the system must clear page by page: shown beside the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
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


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of one refresh. ``load`` is the pause."""

    publish: float
    fetch: float
    load: float

    @property
    def total(self) -> float:
        return self.publish + self.fetch + self.load


class Seam:
    """Learner and engine with the same theta. ``stages``: of every refresh, in order, for all weights and for those that training changes."""

    def __init__(self, learner: LearnerGroup, policy: VLLMPolicy) -> None:
        self._learner, self._policy = learner, policy
        self._served: ObjectStoreWeights | None = (
            None  # in a run, too, the version before is there while the next is published
        )
        self.stages: dict[bool, list[Stages]] = {False: [], True: []}

    def refresh(self, trainable_only: bool) -> Timing:
        """Publish, fetch, load; then one token, to see that the engine serves."""
        cpu, began = time.process_time(), time.perf_counter()
        weights = ObjectStoreChannel(trainable_only).publish(self._learner)
        published = time.perf_counter()
        tensors = weights.fetch(FETCH_S)
        fetched = time.perf_counter()
        asyncio.run(self._policy.refresh(self._policy.version + 1, tensors, weights.complete))
        loaded, cpu = time.perf_counter(), time.process_time() - cpu
        self._served = weights
        self.stages[trainable_only].append(Stages(published - began, fetched - published, loaded - fetched))
        asyncio.run(
            self._policy.generate(
                [1, 2, 3], Sampling(0.0, 1, 0, kind="act"), AdapterKey(self._policy.version, "", 0)
            )
        )
        return Timing(loaded - began, cpu)

    def copies(self, trainable_only: bool) -> Mapping[str, Tensor]:
        """The tensors of a publication, in memory of this process."""
        fetched = ObjectStoreChannel(trainable_only).publish(self._learner).fetch(FETCH_S)
        return {name: tensor.clone() for name, tensor in fetched.items()}

    def packing_s(self, tensors: Mapping[str, Tensor]) -> float:
        """Seconds of vLLM's own packing alone, for all matrices that it packs; 0 where it packs none."""
        return asyncio.run(_wait(self._policy._loop.call(partial(_packing_s, tensors=tensors), "other")))


def run(context: Context) -> Outcome:
    with _seam(context) as seam:
        for _ in range(1 if context.quick else 6):  # until the object store has used all of its memory
            seam.refresh(False)
        first, seam.stages[False] = seam.stages[False][0], []
        tensors, changed = seam.copies(False), seam.copies(True)
        copy_all, copy_changed = _memcpy(tensors), _memcpy(changed)
        works: dict[str, Callable[[], Timing]] = {
            "memcpy": partial(timed, copy_all),
            "all": partial(seam.refresh, False),
            "memcpy changed": partial(timed, copy_changed),
            "changed": partial(seam.refresh, True),
        }
        timings = in_turns(works, context.repeats)
        packing = float(np.median([seam.packing_s(tensors) for _ in range(3)]))
    walls = {name: tuple(timing.wall_s for timing in taken) for name, taken in timings.items()}
    mib = {
        name: sum(tensor.nbytes for tensor in each.values()) / 2**20
        for name, each in (("all", tensors), ("changed", changed))
    }
    return _outcome(
        walls, {"all": seam.stages[False][1:], "changed": seam.stages[True][1:]}, mib, first, packing
    )


def _outcome(
    walls: Mapping[str, tuple[float, ...]],
    stages: Mapping[str, list[Stages]],
    mib: Mapping[str, float],
    first: Stages,
    packing: float,
) -> Outcome:
    copies = {"all": float(np.median(walls["memcpy"])), "changed": float(np.median(walls["memcpy changed"]))}
    medians = {
        name: {part: float(np.median([getattr(each, part) for each in taken])) for part in PARTS}
        for name, taken in stages.items()
    }
    floor = 1 + packing / copies["all"]
    note = f"floor {floor:.1f}: one copy into shared memory, and vLLM's packing of the matrices that it keeps packed, alone"
    copied, changed = f"memcpy of {mib['all']:.0f} MiB", f"{mib['changed']:.0f} MiB: the last layers"
    exact = "exact, as the others never change; it is what learner.trainable=last_layers publishes"
    cases = (
        Case(
            "all weights",
            copied,
            "publish + fetch + load",
            "s",
            walls["memcpy"],
            walls["all"],
            "candidate/baseline",
            GOAL,
            note,
        ),
        Case(
            "changed tensors only",
            "all weights",
            changed,
            "s",
            walls["all"],
            walls["changed"],
            "baseline/candidate",
            None,
            exact,
        ),
    )
    rows = [_row(f"{name}, {mib[name]:.0f} MiB", medians[name], copies[name]) for name in medians]
    rows.append(
        _row("all, the first of a run", {part: getattr(first, part) for part in PARTS}, copies["all"])
    )
    table = Table(
        "Seconds of a refresh by stage (times memcpy of the same bytes); the engine pauses for the load only",
        ("weights", *PARTS),
        tuple(rows),
    )
    figures = {f"{name}_{part}_s": value for name, parts in medians.items() for part, value in parts.items()}
    figures |= {f"{name}_pause_over_memcpy": parts["load"] / copies[name] for name, parts in medians.items()}
    figures |= {
        "memcpy_s": copies["all"],
        "packing_s": packing,
        "floor_over_memcpy": floor,
        "first_publish_s": first.publish,
    }
    return Outcome(cases, (table,), (), figures)


PARTS = ("publish", "fetch", "load", "total")


def _row(name: str, parts: Mapping[str, float], memcpy: float) -> tuple[str, ...]:
    return (name, *(f"{parts[part]:.3f} ({parts[part] / memcpy:.1f}x)" for part in PARTS))


@contextmanager
def _seam(context: Context) -> Iterator[Seam]:
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(context.model_path).num_hidden_layers
    config = LearnerConfig(
        threads=context.threads, trainable="last_layers", trainable_layers=min(TRAINED_LAYERS, layers // 2)
    )
    basis = compute_basis_from_checkpoint(context.model_path, FastWeightsConfig(basis="random"), seed=0)
    engine = EngineConfig(slots=4, max_model_tokens=256, kv_cache_gib=0.25, receipts="off")
    whole = RunConfig(learner=config)
    with ray_runtime(whole, Demand(cpus=config.cpus_per_worker, gpus=0)):
        spec = LearnerSpec(config, ObjectiveConfig(), str(context.model_path), basis, seed=0, temperature=1.0)
        learner = LearnerGroup(spec, whole.ray.startup_timeout_s)
        policy = VLLMPolicy(
            context.model_path, ModelConfig(dtype="float32"), engine, basis, (), 0, context.threads, seed=0
        )
        yield Seam(learner, policy)
        policy.close()
        learner.close()


def _memcpy(tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """torch's copy of each tensor into memory that was written before."""
    targets = {name: tensor.clone() for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)

    return copy


def _packing_s(engine: Any, tensors: Mapping[str, Tensor]) -> float:
    """On the engine's step thread, with its threads; the packed matrices are thrown away."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from actors.engine.vllm_internals.tensors import find_places

    seconds = 0.0
    for place in find_places(model_of(engine)):
        owners = [
            owner
            for owner in place.owners
            if getattr(owner, "cpu_linear", nn.functional.linear) is not nn.functional.linear
        ]
        if place.leaf != "weight" or not owners:
            continue
        shell: Any = nn.Module()
        shell.weight = nn.Parameter(torch.cat([tensors[name] for name in place.parts]), requires_grad=False)
        began = time.perf_counter()
        dispatch_cpu_unquantized_gemm(shell, remove_weight=True)
        seconds += time.perf_counter() - began
    return seconds


async def _wait(future: Any) -> float:
    seconds: float = await asyncio.wrap_future(future)
    return seconds
