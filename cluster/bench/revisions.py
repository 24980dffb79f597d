"""What a revision costs: installing it, decoding and reading prompts under it, and looking after it in each step.

decode, prefill: vLLM with each sequence under an adapter of its own, against the same engine without adapters, each in a process of its own.
install: VLLMPolicy.install of revisions that wait together, and the slot load at their first step, against vLLM's own way: a safetensors file (in
memory, where there is such a folder) and add_lora, which loads the slot too.
adapters of a step: what the worker does with the adapters of each step, against vLLM's own methods on the same objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.bench.harness import Child, child, in_turns
from cluster.bench.revisions_engines import FileEngine, InstallingPolicy, Setup, SteppedEngine, SteppedManager
from cluster.bench.values import Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table

CALL_S = 900.0
LIMIT_MS = 1.0
"""Of one install, and of a step's look after its adapters."""


@dataclass(frozen=True, slots=True)
class Sizes:
    sequences: tuple[int, ...]
    prompt_tokens: int
    decode_prompt_tokens: int
    decode_tokens: int
    installs: int
    steps: tuple[tuple[int, int], ...]  # (active, registered); the last is the largest
    step_calls: int

    @staticmethod
    def of(context: Context) -> Sizes:
        if context.quick:
            return Sizes((4,), 24, 8, 6, 4, ((2, 4), (4, 8)), 5)
        return Sizes((16, 32), 64, 16, 32, 32, ((64, 128), (256, 512)), 20)


def run(context: Context) -> Outcome:
    sizes = Sizes.of(context)
    longest = max(sizes.prompt_tokens, sizes.decode_prompt_tokens + sizes.decode_tokens) + 1
    speed, table = _speed(
        context, sizes, Setup(context.model_path, context.threads, max(sizes.sequences), longest)
    )
    installs = _installs(context, sizes, Setup(context.model_path, context.threads, sizes.installs, longest))
    steps = _steps(context, sizes, Setup(context.model_path, context.threads, sizes.steps[-1][0], longest))
    return Outcome((*installs, *speed, *steps), (table,))


def _speed(context: Context, sizes: Sizes, setup: Setup) -> tuple[list[Case], Table]:
    cases: list[Case] = []
    rows: list[tuple[str, ...]] = []
    with (
        child("engine without adapters", SteppedEngine, (setup, False)) as base,
        child("engine with adapters", SteppedEngine, (setup, True)) as lora,
    ):
        for count in sizes.sequences:
            given = {
                "prefill": (count, sizes.prompt_tokens),
                "decode": (count, sizes.decode_prompt_tokens, sizes.decode_tokens),
            }
            tokens = {"prefill": count * sizes.prompt_tokens, "decode": count * (sizes.decode_tokens - 1)}
            for phase, share in (("decode", 0.9), ("prefill", 0.95)):
                timings = in_turns(
                    {"base": _call(base, phase, given[phase]), "lora": _call(lora, phase, given[phase])},
                    context.repeats,
                )
                cases.append(
                    Case(
                        f"{phase}, {count} sequences",
                        "without adapters",
                        f"{count} adapters",
                        "tokens/s",
                        tuple(tokens[phase] / timing.wall_s for timing in timings["base"]),
                        tuple(tokens[phase] / timing.wall_s for timing in timings["lora"]),
                        "candidate/baseline",
                        Goal("at least", share),
                    )
                )
                seconds = [
                    float(np.median([timing.cpu_s for timing in timings[name]])) for name in ("base", "lora")
                ]
                rows.append(
                    (
                        f"{phase}, {count} sequences",
                        f"{seconds[0]:.3f}",
                        f"{seconds[1]:.3f}",
                        f"{seconds[0] / seconds[1]:.3f}",
                    )
                )
    header = ("case", "without adapters: CPU s", "with: CPU s", "share of the speed")
    return cases, Table(
        "The same by CPU seconds (steadier where the machine has other work)", header, tuple(rows)
    )


def _installs(context: Context, sizes: Sizes, setup: Setup) -> list[Case]:
    count = sizes.installs
    with (
        child("policy", InstallingPolicy, (setup,)) as policy,
        child("vLLM with files", FileEngine, (setup,)) as files,
    ):
        loads: list[Timing] = []

        def ours() -> Timing:
            timing: Timing = policy.call("install", (count,), CALL_S)
            loads.append(policy.call("load_slots", (), CALL_S))
            return timing

        timings = in_turns({"files": _call(files, "install", (count,)), "ours": ours}, context.repeats)
    install = tuple(timing.wall_s / count * 1e3 for timing in timings["ours"])
    load = tuple(timing.wall_s / count * 1e3 for timing in loads[-context.repeats :])
    both = tuple(a + b for a, b in zip(install, load, strict=True))
    file = tuple(timing.wall_s / count * 1e3 for timing in timings["files"])
    limit, goal = (LIMIT_MS,) * context.repeats, Goal("at most", 1.0)
    return [
        Case(
            f"install, each of {count}",
            "limit",
            "VLLMPolicy.install",
            "ms",
            limit,
            install,
            "candidate/baseline",
            goal,
        ),
        Case(
            f"install and slot load, each of {count}",
            "limit",
            "install and first step",
            "ms",
            limit,
            both,
            "candidate/baseline",
            goal,
        ),
        Case(
            f"install and slot load, each of {count}, vLLM",
            "file and add_lora",
            "install and first step",
            "ms",
            file,
            both,
            "baseline/candidate",
            None,
        ),
    ]


def _steps(context: Context, sizes: Sizes, setup: Setup) -> list[Case]:
    cases: list[Case] = []
    with child("adapter manager", SteppedManager, (setup,)) as manager:
        for active, registered in sizes.steps:
            manager.call("fill", (active, registered), CALL_S)
            timings = in_turns(
                {name: _call(manager, name, (sizes.step_calls,)) for name in ("theirs", "ours")},
                context.repeats,
            )
            theirs, ours = (
                tuple(timing.wall_s / sizes.step_calls * 1e3 for timing in timings[name])
                for name in ("theirs", "ours")
            )
            name, limit = (
                f"adapters of a step, {active} active of {registered}",
                (LIMIT_MS,) * context.repeats,
            )
            cases.append(Case(name, "vLLM's own", "ours", "ms", theirs, ours, "baseline/candidate", None))
            cases.append(
                Case(
                    f"{name}, limit",
                    "limit",
                    "ours",
                    "ms",
                    limit,
                    ours,
                    "candidate/baseline",
                    Goal("at most", 1.0),
                )
            )
    return cases


def _call(process: Child, method: str, arguments: tuple[Any, ...]) -> Callable[[], Timing]:
    def work() -> Timing:
        timing: Timing = process.call(method, arguments, CALL_S)
        return timing

    return work
