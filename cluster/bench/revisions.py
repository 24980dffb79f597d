"""What a revision costs: its install, decode and prefill under it, and the look after adapters in each step.

decode, prefill      vLLM with each sequence under an adapter of its own, against the same engine without
                     adapters; each engine in its own process
install              VLLMPolicy.install of revisions that wait together, and the slot load at their first
                     step, against a limit
adapters of a step   what the worker does with each step's adapters, against vLLM's own methods
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.engine.adapters import AdapterTable, as_tensors
from actors.engine.policy import VLLMPolicy
from actors.engine.start import (
    build_engine,
    engine_arguments,
    prepare_environment,
    read_vocabulary,
    start_engine,
)
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.types import AdapterKey, FastWeights
from cluster.bench.harness import child, in_turns, timed
from cluster.bench.values import Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig

_CALL_S = 900.0

CALL_S = 900.0
LIMIT_MS = 1.0  # of one install, and of a step's look after its adapters


@dataclass(frozen=True, slots=True)
class Sizes:
    """``steps``: pairs of (active, registered) adapters; the last pair is the largest."""

    sequences: tuple[int, ...]
    prompt_tokens: int
    decode_prompt_tokens: int
    decode_tokens: int
    installs: int
    steps: tuple[tuple[int, int], ...]
    step_calls: int

    @staticmethod
    def of(context: Context) -> Sizes:
        if context.quick:
            return Sizes((4,), 24, 8, 6, 4, ((2, 4), (4, 8)), 5)
        return Sizes((16, 32), 64, 16, 32, 32, ((64, 128), (256, 512)), 20)


def run(context: Context) -> Outcome:
    sizes = Sizes.of(context)
    longest = max(sizes.prompt_tokens, sizes.decode_prompt_tokens + sizes.decode_tokens) + 1

    def setup(slots: int) -> Setup:
        return Setup(context.model_path, context.threads, slots, longest)

    speed, table = _speed(context, sizes, setup(max(sizes.sequences)))
    installs = _installs(context, sizes, setup(sizes.installs))
    steps = _steps(context, sizes, setup(sizes.steps[-1][0]))
    return Outcome((*installs, *speed, *steps), (table,))


def _speed(context: Context, sizes: Sizes, setup: Setup) -> tuple[list[Case], Table]:
    cases: list[Case] = []
    rows: list[tuple[str, ...]] = []
    with (
        child("engine without adapters", SteppedEngine, (setup, False)) as base,
        child("engine with adapters", SteppedEngine, (setup, True)) as lora,
    ):
        for count in sizes.sequences:
            decode = (count, sizes.decode_prompt_tokens, sizes.decode_tokens)
            for phase, sizes_of_phase, tokens, share in (
                ("decode", decode, count * (sizes.decode_tokens - 1), 0.9),
                ("prefill", (count, sizes.prompt_tokens), count * sizes.prompt_tokens, 0.95),
            ):
                timings = in_turns(
                    {
                        "base": partial(base.call, phase, sizes_of_phase, CALL_S),
                        "lora": partial(lora.call, phase, sizes_of_phase, CALL_S),
                    },
                    context.repeats,
                )
                name, goal = f"{phase}, {count} sequences", Goal("at least", share)
                rates = [
                    tuple(tokens / timing.wall_s for timing in timings[side]) for side in ("base", "lora")
                ]
                names = ("without adapters", f"{count} adapters")
                cases.append(Case(name, *names, "tokens/s", rates[0], rates[1], "candidate/baseline", goal))
                cpu, lora_cpu = (
                    float(np.median([timing.cpu_s for timing in timings[side]])) for side in ("base", "lora")
                )
                rows.append((name, f"{cpu:.3f}", f"{lora_cpu:.3f}", f"{cpu / lora_cpu:.3f}"))
    header = ("case", "without adapters: CPU s", "with: CPU s", "share of the speed")
    title = "The same by CPU seconds (steadier where the machine has other work)"
    return cases, Table(title, header, tuple(rows))


def _installs(context: Context, sizes: Sizes, setup: Setup) -> list[Case]:
    count = sizes.installs
    loads: list[Timing] = []
    with child("policy", InstallingPolicy, (setup,)) as policy:

        def install() -> Timing:
            timing: Timing = policy.call("install", (count,), CALL_S)
            loads.append(policy.call("load_slots", (), CALL_S))
            return timing

        timings = in_turns({"policy": install}, context.repeats)
    installs = _milliseconds(timings["policy"], count)
    slots = _milliseconds(loads[-context.repeats :], count)
    both = tuple(a + b for a, b in zip(installs, slots, strict=True))
    name = f"install and slot load, each of {count}"
    return [
        _against_limit(f"install, each of {count}", "VLLMPolicy.install", installs),
        _against_limit(name, "install and first step", both),
    ]


def _steps(context: Context, sizes: Sizes, setup: Setup) -> list[Case]:
    cases: list[Case] = []
    calls = sizes.step_calls
    with child("adapter manager", SteppedManager, (setup,)) as manager:
        for active, registered in sizes.steps:
            manager.call("fill", (active, registered), CALL_S)
            works = {name: partial(manager.call, name, (calls,), CALL_S) for name in ("theirs", "ours")}
            timings = in_turns(works, context.repeats)
            theirs, ours = (_milliseconds(timings[name], calls) for name in ("theirs", "ours"))
            name = f"adapters of a step, {active} active of {registered}"
            cases.append(Case(name, "vLLM's own", "ours", "ms", theirs, ours, "baseline/candidate", None))
            cases.append(_against_limit(f"{name}, limit", "ours", ours))
    return cases


def _against_limit(name: str, candidate: str, values: tuple[float, ...]) -> Case:
    limits, goal = (LIMIT_MS,) * len(values), Goal("at most", 1.0)
    return Case(name, "limit", candidate, "ms", limits, values, "candidate/baseline", goal)


def _milliseconds(timings: list[Timing], count: int) -> tuple[float, ...]:
    """Wall milliseconds of each of the ``count`` things that a timing took."""
    return tuple(timing.wall_s / count * 1e3 for timing in timings)


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings that all engines here share."""

    model_path: Path
    threads: int
    slots: int
    max_tokens: int

    @property
    def engine(self) -> EngineConfig:
        slots, tokens = self.slots, self.max_tokens
        return EngineConfig(slots=slots, max_model_tokens=tokens, kv_cache_gib=0.5, receipts="off")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(dtype="float32")

    def basis(self) -> Basis:
        """A random basis: its values make no difference here."""
        return compute_basis_from_checkpoint(self.model_path, FastWeightsConfig(basis="random"), seed=0)

    def engine_with_adapters(self, basis: Basis) -> Any:
        return build_engine(self.model_path, self.model, self.engine, basis, threads=self.threads, seed=0)

    def arguments(self, basis: Basis) -> Any:
        """vLLM's EngineArgs."""
        return engine_arguments(self.model_path, self.model, self.engine, basis, 0)


class Revisions:
    """Draws revisions and prompts that were never seen before."""

    def __init__(self, basis: Basis, vocabulary: int) -> None:
        self._basis, self._vocabulary = basis, vocabulary
        self._draw = np.random.default_rng(0)
        self._revision = 0

    def weights(self) -> FastWeights:
        b = {
            name: self._draw.normal(0, 1e-3, (rows, self._basis.rank)).astype(np.float32)
            for name, rows in self._basis.d_out.items()
        }
        return FastWeights(self._basis.id, 1, b)

    def key(self) -> AdapterKey:
        self._revision += 1
        return AdapterKey(0, f"bench-{self._revision}", 1)

    def prompt(self, length: int) -> list[int]:
        ids: list[int] = self._draw.integers(0, self._vocabulary, length).tolist()
        return ids


class SteppedEngine:
    """An engine that is stepped by hand, so that prefill and decode are timed apart."""

    def __init__(self, setup: Setup, adapters: bool) -> None:
        prepare_environment(setup.threads)
        basis = setup.basis()
        self._revisions = Revisions(basis, read_vocabulary(setup.model_path, setup.model, setup.engine))
        self._adapters, self._requests = adapters, 0
        self._table = AdapterTable(0)
        if adapters:
            self._engine = setup.engine_with_adapters(basis)
            return
        plain = replace(setup.arguments(basis), enable_lora=False, lora_target_modules=None)
        self._engine = start_engine(plain, setup.threads)
        _use_our_count()

    def prefill(self, sequences: int, length: int) -> Timing:
        """Time ``sequences`` prompts of ``length`` tokens, with one token sampled after each."""
        return self._run(sequences, length, tokens=1, untimed_steps=0)

    def decode(self, sequences: int, length: int, tokens: int) -> Timing:
        """Time the steps that sample the second to the last of ``tokens`` tokens of each sequence."""
        return self._run(sequences, length, tokens, untimed_steps=1)

    def _run(self, sequences: int, length: int, tokens: int, untimed_steps: int) -> Timing:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        keys = [self._revisions.key() for _ in range(sequences)] if self._adapters else []
        for key in keys:
            self._table.put(self._engine, key, as_tensors(self._revisions.weights()))
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for place in range(sequences):
            self._requests += 1
            adapter = self._table.find(keys[place]) if keys else None
            prompt = tokens_input(self._revisions.prompt(length))
            self._engine.add_request(str(self._requests), prompt, sampling, lora_request=adapter)
        for _ in range(untimed_steps):
            self._engine.step()

        def step_until_done() -> None:
            while self._engine.has_unfinished_requests():
                self._engine.step()

        timing = timed(step_until_done)
        self._table.drop(self._engine, keys, set())
        return timing


class InstallingPolicy:
    """Installs through VLLMPolicy, as episodes do."""

    def __init__(self, setup: Setup) -> None:
        basis = setup.basis()
        self._revisions = Revisions(basis, 2)
        self._policy = VLLMPolicy(
            setup.model_path, setup.model, setup.engine, basis, (), version=0, threads=setup.threads, seed=0
        )

    def install(self, count: int) -> Timing:
        """Time ``count`` installs that are asked for at once."""
        wanted = [(self._revisions.key(), self._revisions.weights()) for _ in range(count)]

        async def work() -> Timing:
            wall, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(self._policy.install(key, weights, None) for key, weights in wanted))
            return Timing(time.perf_counter() - wall, time.process_time() - cpu)

        self._keys = [key for key, _ in wanted]
        return asyncio.run(work())

    def load_slots(self) -> Timing:
        """Time the slot loads of the last ``install``'s adapters, as in the first step that names them all.

        The adapters are released afterwards.
        """

        def load(engine: Any) -> Timing:
            manager = _adapter_manager(engine)
            requests = {self._policy._table.find(key) for key in self._keys}
            return timed(lambda: manager._apply_adapters(requests))

        timing = self._policy._loop.call(load, "other").result(_CALL_S)
        asyncio.run(self._policy.release(self._keys))
        return timing


class SteppedManager:
    """The worker's adapter manager with many adapters. It calls what each engine step calls."""

    def __init__(self, setup: Setup) -> None:
        prepare_environment(setup.threads)
        basis = setup.basis()
        self._revisions = Revisions(basis, 2)
        self._engine = setup.engine_with_adapters(basis)
        self._manager = _adapter_manager(self._engine)
        self._table = AdapterTable(0)
        self._registered: list[Any] = []

    def fill(self, active: int, registered: int) -> None:
        """Register adapters until there are ``registered``; put the last ``active`` into slots."""
        while len(self._registered) < registered:
            key = self._revisions.key()
            self._table.put(self._engine, key, as_tensors(self._revisions.weights()))
            self._registered.append(self._table.find(key))
            self._manager.add_adapter(self._registered[-1])
        self._requests = set(self._registered[-active:])
        self._manager._apply_adapters(self._requests)

    def ours(self, calls: int) -> Timing:
        return self._calls(calls, self._manager._apply_adapters)

    def theirs(self, calls: int) -> Timing:
        """Time vLLM's own methods: the stand-ins on this object are taken away for the moment."""
        stand_ins = {name: self._manager.__dict__.pop(name) for name in ("_apply_adapters", "list_adapters")}
        try:
            return self._calls(calls, self._manager._apply_adapters)
        finally:
            self._manager.__dict__.update(stand_ins)

    def _calls(self, calls: int, apply: Callable[[set[Any]], None]) -> Timing:
        def work() -> None:
            for _ in range(calls):
                apply(self._requests)

        return timed(work)


def _adapter_manager(engine: Any) -> Any:
    """vLLM's WorkerLoRAManager, in this process."""
    return engine.model_executor.driver_worker.worker.model_runner.lora_manager


def _use_our_count() -> None:
    """Count the rank of sampled tokens as Engram's engines do.

    Why: vLLM's own function would compile for a while, and is no part of the comparison.
    """
    from vllm.v1.sample import sampler

    from actors.engine.vllm_internals.worker_extension import count_at_least

    sampler.batched_count_greater_than = count_at_least
