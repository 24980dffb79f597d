"""The quickstart's rollout side against vLLM alone: what episodes cost beyond their sampled tokens.

    Engram     configs/quickstart.yaml: engine with adapters and receipts, writer, recall environment, groups
    baseline   vLLM without adapters replays the same requests, chained per episode, as many episodes at once;
               nothing is written

A round is the episodes of one training step, all at once, on an empty prefix cache. Both sides have the same
number of engine threads. The two sides are in rollout_sides.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.bench.harness import child, in_turns
from cluster.bench.rollout_sides import EngramSide, Round, Setup, VLLMSide
from cluster.bench.scripted import QUICKSTART
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Spread, Timing
from cluster.measure.report import Table
from configs.load import load_config
from configs.schema import RunConfig

GOAL = Goal("at least", 0.85)
ROUND_S = 900.0
QUICK_TASKS, QUICK_SIBLINGS = 1, 2
STEP_PHASES = ("act", "extract", "receipt", "write", "install", "other", "idle")


def run(context: Context) -> Outcome:
    from actors.fast_weights.basis import compute_basis_from_checkpoint, save_basis

    config = _config(context)
    # Each episode has its own task: the scripted siblings of one task would all write the same flashcards,
    # and the writer reads those only once.
    tasks, siblings = config.train.tasks_per_step * config.train.group_size, 1
    if context.quick:
        tasks, siblings = QUICK_TASKS, QUICK_SIBLINGS
    with tempfile.TemporaryDirectory() as folder:
        basis_path = Path(folder) / "basis.safetensors"
        basis = compute_basis_from_checkpoint(context.model_path, config.fast_weights, config.seed)
        save_basis(basis, basis_path)
        return _measure(Setup(config, context.model_path, basis_path, tasks, siblings), context.repeats)


def _config(context: Context) -> RunConfig:
    config = load_config(QUICKSTART, [])
    return replace(config, rollout=replace(config.rollout, threads=context.threads))


def _measure(setup: Setup, repeats: int) -> Outcome:
    with (
        child("Engram's rollout side", EngramSide, (setup,)) as engram,
        child("vLLM", VLLMSide, (setup,)) as vllm,
    ):
        # The first round warms up, and its requests are those that vLLM replays.
        rounds: list[Round] = [engram.call("play", (), ROUND_S)]
        steps = 0

        def play() -> Timing:
            rounds.append(engram.call("play", (), ROUND_S))
            if _token_counts(rounds[-1]) != _token_counts(rounds[0]):
                raise BenchError("two rounds of the same episodes asked for different numbers of tokens")
            return rounds[-1].timing

        def replay() -> Timing:
            nonlocal steps
            timing, steps = vllm.call("play", (rounds[0].episodes,), ROUND_S)
            assert isinstance(timing, Timing)
            return timing

        timings = in_turns({"vllm": replay, "engram": play}, repeats)
    return _outcome(setup.tasks * setup.siblings, timings, rounds[-repeats:], steps)


def _token_counts(played: Round) -> list[list[tuple[int, int]]]:
    return sorted(
        [(len(request.prompt_ids), request.generated) for request in requests] for requests in played.episodes
    )


def _outcome(
    episodes: int, timings: Mapping[str, Sequence[Timing]], rounds: Sequence[Round], vllm_steps: int
) -> Outcome:
    """Compare the repeats of both sides, of ``episodes`` a round."""

    def median(values: Iterable[float]) -> float:
        return Spread.of(tuple(values)).median

    spent = {phase: median(played.phases[phase] for played in rounds) for phase in STEP_PHASES}
    plain, wall = (median(timing.wall_s for timing in timings[side]) for side in ("vllm", "engram"))
    writing = sum(spent[phase] for phase in ("write", "receipt", "install"))
    note = (
        f"writes, receipts and installs are {writing / wall:.0%} of Engram's time; "
        f"were they free, the ratio would be {plain / (wall - writing):.2f}; "
        f"{rounds[-1].steps} engine steps against {vllm_steps}"
    )
    vllm, engram = (
        tuple(episodes / timing.wall_s for timing in timings[side]) for side in ("vllm", "engram")
    )
    unit = "episodes/s"
    case = Case(unit, "vLLM alone", "Engram", unit, vllm, engram, "candidate/baseline", GOAL, note)
    figures = {f"{phase}_fraction": seconds / sum(spent.values()) for phase, seconds in spent.items()} | {
        "engine_steps": rounds[-1].steps,
        "vllm_steps": vllm_steps,
        "environment_s_per_episode": median(played.environment_s / episodes for played in rounds),
        "cpu_ratio": median(
            one.cpu_s / other.cpu_s for one, other in zip(timings["vllm"], timings["engram"], strict=True)
        ),
    }
    return Outcome((case,), (_timeline(episodes, spent, plain),), figures=figures)


def _timeline(episodes: int, spent: dict[str, float], plain: float) -> Table:
    """The step thread's seconds, as the training loop logs them under timeline/worker_*."""
    total = sum(spent.values())
    rows = [
        (phase, f"{seconds / episodes:.3f}", f"{seconds / total:.1%}", f"{seconds / plain:.1%}")
        for phase, seconds in [*spent.items(), ("all", total)]
    ]
    header = ("phase", "s per episode", "of the step thread's time", "of vLLM's time alone")
    return Table("Timeline of Engram's step thread", header, tuple(rows))
