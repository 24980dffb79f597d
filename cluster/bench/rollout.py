"""The rollout side of the quickstart against vLLM alone: what episodes cost beyond the tokens that they sample, and where the time goes.

    Engram    configs/quickstart.yaml: engine with adapters and receipts, writer, recall environment, groups of siblings (rollout_sides.EngramSide)
    baseline  vLLM without adapters replays the very requests, chained per episode, as many episodes at once; nothing is written

A round is the episodes of one training step, all at once, on an empty prefix cache. Both sides have the same number of engine threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import configs
from cluster.bench.harness import child, in_turns
from cluster.bench.rollout_sides import Asked, EngramSide, Round, Setup, VLLMSide
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Spread, Timing
from cluster.measure.report import Table
from configs.load import load_config
from configs.schema import RunConfig

GOAL = Goal("at least", 0.85)
ROUND_S = 900.0
QUICK_TASKS, QUICK_SIBLINGS = 1, 2
STEP_PHASES = ("act", "extract", "receipt", "write", "install", "other", "idle")


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that the writes of a round can take: their FLOPs in one batch, at the rate of a large matmul."""

    flops: float
    rate: float

    @property
    def seconds(self) -> float:
        return self.flops / self.rate


def run(context: Context) -> Outcome:
    from actors.fast_weights.basis import compute_basis_from_checkpoint, save_basis

    config = _config(context)
    # A task of its own for each episode: the scripted siblings of one task would all write the same flashcards, which the writer reads only once.
    tasks, siblings = (
        (QUICK_TASKS, QUICK_SIBLINGS)
        if context.quick
        else (config.train.tasks_per_step * config.train.group_size, 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        basis_path = Path(folder) / "basis.safetensors"
        save_basis(
            compute_basis_from_checkpoint(context.model_path, config.fast_weights, config.seed), basis_path
        )
        setup = Setup(config, context.model_path, basis_path, tasks, siblings)
        with (
            child("Engram's rollout side", EngramSide, (setup,)) as engram,
            child("vLLM", VLLMSide, (setup,)) as vllm,
        ):
            rounds: list[Round] = [
                engram.call("play", (), ROUND_S)
            ]  # the first is a warm-up and says what the baseline replays

            steps = 0

            def play() -> Timing:
                rounds.append(engram.call("play", (), ROUND_S))
                if _counts(rounds[-1]) != _counts(rounds[0]):
                    raise BenchError("two rounds of the same episodes asked for different numbers of tokens")
                return rounds[-1].timing

            def replay() -> Timing:
                nonlocal steps
                timing, steps = vllm.call("play", (rounds[0].episodes,), ROUND_S)
                assert isinstance(timing, Timing)
                return timing

            timings = in_turns({"vllm": replay, "engram": play}, context.repeats)
            flops, rate = engram.call("write_floor", (), ROUND_S)
    return _outcome(
        tasks * siblings,
        timings["vllm"],
        timings["engram"],
        rounds[-context.repeats :],
        steps,
        Floor(flops, rate),
    )


def _config(context: Context) -> RunConfig:
    config = load_config(Path(configs.__path__[0]) / "quickstart.yaml", [])
    return replace(config, rollout=replace(config.rollout, threads=context.threads))


def _counts(one: Round) -> list[list[tuple[int, int]]]:
    return sorted(
        [(len(asked.prompt_ids), asked.generated) for asked in requests] for requests in one.episodes
    )


def _outcome(
    episodes: int,
    vllm: Sequence[Timing],
    engram: Sequence[Timing],
    rounds: Sequence[Round],
    plain_steps: int,
    floor: Floor,
) -> Outcome:
    spent = {phase: Spread.of(tuple(one.phases[phase] for one in rounds)).median for phase in STEP_PHASES}
    wall, plain = (Spread.of(tuple(timing.wall_s for timing in timings)).median for timings in (engram, vllm))
    beyond = sum(spent[phase] for phase in ("write", "receipt", "install"))
    case = Case(
        "episodes/s",
        "vLLM alone",
        "Engram",
        "episodes/s",
        tuple(episodes / timing.wall_s for timing in vllm),
        tuple(episodes / timing.wall_s for timing in engram),
        "candidate/baseline",
        GOAL,
        f"writes, receipts and installs are {beyond / wall:.0%} of Engram's time; were they free, the ratio would be {plain / (wall - beyond):.2f}; "
        f"the writes' {floor.flops / 1e9:.0f} GFLOP at the {floor.rate / 1e9:.0f} GFLOP/s of a large matmul alone allow "
        f"{plain / (plain + floor.seconds):.2f}; "
        f"{rounds[-1].steps} engine steps against {plain_steps}",
    )
    figures = {f"{phase}_fraction": seconds / sum(spent.values()) for phase, seconds in spent.items()}
    figures |= {"engine_steps": rounds[-1].steps, "vllm_steps": plain_steps}
    figures["environment_s_per_episode"] = Spread.of(
        tuple(one.environment_s / episodes for one in rounds)
    ).median
    figures |= {"write_gflop": floor.flops / 1e9, "write_floor_ratio": plain / (plain + floor.seconds)}
    figures["cpu_ratio"] = Spread.of(
        tuple(a.cpu_s / b.cpu_s for a, b in zip(vllm, engram, strict=True))
    ).median
    return Outcome((case,), (_timeline(episodes, spent, plain), _requests(rounds[-1])), figures=figures)


def _timeline(episodes: int, spent: dict[str, float], plain: float) -> Table:
    """The step thread's seconds, as the training loop logs them under timeline/worker_*."""
    total = sum(spent.values())
    rows = [
        (phase, f"{seconds / episodes:.3f}", f"{seconds / total:.1%}", f"{seconds / plain:.1%}")
        for phase, seconds in spent.items()
    ]
    rows.append(("all", f"{total / episodes:.3f}", "100.0%", f"{total / plain:.1%}"))
    return Table(
        "Timeline of Engram's step thread",
        ("phase", "s per episode", "of the step thread's time", "of vLLM's time alone"),
        tuple(rows),
    )


def _requests(one: Round) -> Table:
    """What was asked of the engine, per episode."""
    asked = [request for requests in one.episodes for request in requests]
    episodes = len(one.episodes)

    def row(name: str, requests: Sequence[Asked]) -> tuple[str, ...]:
        prompts, generated = (
            sum(len(request.prompt_ids) for request in requests),
            sum(request.generated for request in requests),
        )
        tokens = sum(len(request.prompt_ids) + request.generated for request in asked)
        per = (len(requests), prompts, generated)
        return (name, *(f"{value / episodes:.1f}" for value in per), f"{(prompts + generated) / tokens:.0%}")

    rows = [row(kind, [request for request in asked if request.kind == kind]) for kind in ("extract", "act")]
    written = [record for record in one.writes if record.outcome == "accepted"]
    prompts, answers = (
        sum(getattr(record, name) for record in written) / episodes
        for name in ("prompt_tokens", "answer_tokens")
    )
    rows.append(
        (
            "write",
            f"{len(written) / episodes:.1f}",
            f"{prompts:.1f}",
            f"{answers:.1f}",
            "trained, not sampled",
        )
    )
    return Table(
        "Requests per episode",
        ("kind", "requests", "prompt tokens", "sampled tokens", "of all tokens"),
        tuple(rows),
    )
