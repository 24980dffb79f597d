"""What a revision costs: its install, decode and prefill under it, and the look after adapters in each step.

decode, prefill      vLLM with each sequence under an adapter of its own, against the same engine without
                     adapters; each engine in its own process
install              VLLMPolicy.install of revisions that wait together, and the slot load at their first
                     step, against a limit
adapters of a step   what the worker does with each step's adapters, against vLLM's own methods
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.bench.harness import child, in_turns
from cluster.bench.revisions_engines import InstallingPolicy, Setup, SteppedEngine, SteppedManager
from cluster.bench.values import Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table

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
