"""Siblings that wait for a tool: a turn of all of them against the ideal, one tool call beside the engine.

    ideal     a turn of the same episodes whose tool answers at once, plus the tool's time, once
    Engram    the same episodes, whose tool takes that time in each sibling

The engine is real, the replies are scripted. The tool sleeps, as a call over a network does: in a sync
session, which runs in a thread, and in an async one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.environments.base import Observation, Split
from actors.episodes.rollout import RolloutRequest
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.types import AdapterKey, Sampling, Task
from actors.types import Outcome as EpisodeOutcome
from cluster.bench.harness import in_turns, timed
from cluster.bench.scripted import QUICKSTART, ScriptedSide, read_chat
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from configs.load import load_config
from configs.schema import MemoryConfig, RunConfig

GOAL = Goal("at most", 1.1)
SIBLINGS, TURNS, TOOL_S = 64, 3, 1.0
QUICK_SIBLINGS, QUICK_TURNS, QUICK_TOOL_S = 4, 2, 0.05
REPLY = "search: lamps"


class ToolSession:
    """Asks for a call of the tool ``turns`` times. ``act`` is the call."""

    question = "Which lamps are there?"

    def __init__(self, turns: int, tool_s: float) -> None:
        self._left, self._tool_s = turns, tool_s

    def observe(self) -> Observation | None:
        return Observation("Call the tool.", wants_action=True) if self._left else None

    def act(self, text: str) -> Any:
        self._left -= 1
        time.sleep(self._tool_s)

    def outcome(self) -> EpisodeOutcome:
        return EpisodeOutcome(1.0, {}, ())


class AsyncToolSession(ToolSession):
    async def act(self, text: str) -> None:
        self._left -= 1
        await asyncio.sleep(self._tool_s)


class Tools:
    """The environment of both: a task says how long its tool takes."""

    name = "tools"
    system_prompt = "Call the tool."

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        return iter(())

    def start(self, task: Task) -> ToolSession:
        kind = AsyncToolSession if task.payload["async"] else ToolSession
        return kind(task.payload["turns"], task.payload["tool_s"])


@dataclass(frozen=True, slots=True)
class _Sizes:
    siblings: int
    turns: int
    tool_s: float


def run(context: Context) -> Outcome:
    sizes = (
        _Sizes(QUICK_SIBLINGS, QUICK_TURNS, QUICK_TOOL_S)
        if context.quick
        else _Sizes(SIBLINGS, TURNS, TOOL_S)
    )
    config = _config(context, sizes)
    basis = compute_basis_from_checkpoint(context.model_path, config.fast_weights, config.seed)
    chat = read_chat(context.model_path)
    reply = chat.reply(REPLY)

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> tuple[int, ...]:
        return reply

    side = ScriptedSide(config, context.model_path, basis, chat, Tools(), script)
    try:
        cases = [_case(side, config, sizes, context.repeats, is_async) for is_async in (False, True)]
    finally:
        side.engine.close()
    turns = {f"turn_s_{case.name.split()[0]}": case.candidate_values[-1] for case in cases}
    return Outcome(tuple(cases), figures=turns)


def _config(context: Context, sizes: _Sizes) -> RunConfig:
    config = load_config(QUICKSTART, [])
    return replace(
        config,
        engine=replace(config.engine, slots=sizes.siblings),
        rollout=replace(config.rollout, threads=context.threads),
    )


def _case(side: ScriptedSide, config: RunConfig, sizes: _Sizes, repeats: int, is_async: bool) -> Case:
    rollout, loop = side.rollout(), asyncio.new_event_loop()  # a Rollout lives on one loop
    memory = MemoryConfig(policy="truncation", max_context_tokens=config.engine.max_model_tokens // 2)
    rounds = 0

    def play(tool_s: float) -> Timing:
        nonlocal rounds
        rounds += 1
        payload = {"turns": sizes.turns, "tool_s": tool_s, "async": is_async}
        task = Task(f"tools-{rounds}", Tools.name, payload, seed=0)
        group_id = f"{'async' if is_async else 'sync'}-{rounds}"
        answer_tokens = config.sampling.max_answer_tokens
        request = RolloutRequest(task, group_id, sizes.siblings, memory, 1.0, answer_tokens, seed=rounds)

        def group() -> None:
            played = loop.run_until_complete(rollout.group(request))
            for failure in played.failed:
                raise BenchError(f"an episode failed: {failure.message}")

        return timed(group)

    timings = in_turns({"at once": lambda: play(0.0), "waits": lambda: play(sizes.tool_s)}, repeats)
    loop.close()
    ideal = tuple(timing.wall_s / sizes.turns + sizes.tool_s for timing in timings["at once"])
    measured = tuple(timing.wall_s / sizes.turns for timing in timings["waits"])
    kind = "async" if is_async else "sync"
    note = (
        f"{sizes.siblings} siblings, {sizes.turns} turns, a tool of {sizes.tool_s:g} s; "
        f"one after the other a turn would take {sizes.siblings * sizes.tool_s:g} s"
    )
    return Case(
        f"{kind} tool, a turn", "ideal", "Engram", "s", ideal, measured, "candidate/baseline", GOAL, note
    )
