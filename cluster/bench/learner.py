"""The learner: a step under one Delta per segment against the same step without; memory of the head; padding of its microbatches.

Real Learner (DeepSpeed, ZeRO 1, float32) on groups with the quickstart's shapes. Both steps run on one learner in turns: same tokens, same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.types import TrajectoryGroup
from cluster.bench.harness import in_turns, timed
from cluster.bench.learner_groups import recall_groups, shared_prefix_fraction, without_deltas
from cluster.bench.learner_head import HeadSize, head_plot, head_table
from cluster.bench.memory import why_unmeasurable
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table
from configs.load import load_config
from configs.schema import RunConfig
from learner.advantage import estimator, score
from learner.batch import pack, rows_of
from learner.learner import Learner
from learner.types import Row

Trainable = Literal["last_layers", "full"]
STEP_GOAL = Goal("at most", 1.05)
PADDING_GOAL = Goal("at most", 1 / 0.9)  # less than a tenth of what goes through the model is padding
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
_VOCABULARIES = (49_152, 151_936)  # SmolLM2's and Qwen3's
_RANKS = (1, 2, 4)


def run(context: Context) -> Outcome:
    config = load_config(QUICKSTART, [])
    basis = compute_basis_from_checkpoint(context.model_path, config.fast_weights, config.seed)
    tasks, siblings = (1, 2) if context.quick else (config.train.tasks_per_step, config.train.group_size)
    groups = recall_groups(context.model_path, config, basis, tasks, siblings)
    cases: list[Case] = []
    for trainable in ("last_layers", "full"):
        cases += step_cases(context, config, basis, groups[: max(1, tasks // 2)], trainable)
    padding, padding_table = padding_of(groups, config)
    shared = shared_prefix_fraction(groups)
    prefixes = Table(
        "A lead: tokens that a sibling's row under revision 0 begins with as well, computed once a group if prefixes were shared",
        ("rows", "share of all tokens"),
        ((f"{sum(len(one.segments) for group in groups for one in group.trajectories)}", f"{shared:.1%}"),),
    )
    table, plots, figures = head(context)
    return Outcome(
        (*cases, padding),
        (table, padding_table, prefixes),
        plots,
        {"shared_prefix_fraction": shared, **figures},
    )


def head(context: Context) -> tuple[Table, tuple[Path, ...], dict[str, float]]:
    """Memory of the head; where peaks cannot be measured, a table that says why."""
    if reason := why_unmeasurable():
        return (
            Table("Log-probs of many tokens, forward and backward: not measured", ("reason",), ((reason,),)),
            (),
            {},
        )
    table, costs = head_table(_head_sizes(context.quick), context.threads)
    figures = {
        f"head_peak_mib {way} {size.vocabulary} {'trained' if size.trained else 'frozen'}": cost.peak / 2**20
        for (size, way), cost in costs.items()
    }
    return table, (head_plot(costs, context.folder),), figures


def step_cases(
    context: Context, config: RunConfig, basis: Basis, groups: Sequence[TrajectoryGroup], trainable: Trainable
) -> tuple[Case, Case]:
    """By CPU seconds (steadier where others use the machine too) and by wall seconds."""
    settings = replace(config.learner, trainable=trainable, learning_rate=1e-7, threads=context.threads)
    if context.quick:
        settings = replace(settings, trainable_layers=min(2, settings.trainable_layers))
    temperature = config.sampling.temperature
    learner = Learner(
        settings,
        config.objective,
        str(context.model_path),
        basis,
        config.seed,
        temperature,
        rank=0,
        world_size=1,
    )
    bare = without_deltas(groups)
    report = learner.step(groups)
    if report.tokens != learner.step(bare).tokens or report.tokens == 0:
        raise BenchError(
            "the step without Deltas evaluated other tokens than the step with them, or neither any: no comparison"
        )
    timings = in_turns(
        {
            "without": lambda: timed(lambda: learner.step(bare)),
            "with": lambda: timed(lambda: learner.step(groups)),
        },
        context.repeats,
    )
    note = (
        f"{report.tokens} tokens in {report.microbatches} microbatches, {report.action_tokens} of them sampled; "
        f"the Deltas add {_added_work(learner, basis):.2%} to the multiplications of the layers: the floor of their cost"
    )
    return _case(f"step, {trainable}, CPU", "cpu_s", timings, note), _case(
        f"step, {trainable}, wall", "wall_s", timings, ""
    )


def padding_of(groups: Sequence[TrajectoryGroup], config: RunConfig) -> tuple[Case, Table]:
    """Of one quickstart step: as packed, beside sorting by length and filling up each microbatch."""
    estimate = estimator(config.objective)
    scored = [one for group in groups for one in score(group, estimate)]
    rows = rows_of(scored, config.objective.aggregate, skip_zero_advantage=True).rows
    budget = config.learner.microbatch_tokens
    tokens = sum(len(row.segment.token_ids) for row in rows)
    filled = sort_and_fill(rows, budget)
    lines = [("sort and fill", "1", f"{len(filled)}", f"{1 - tokens / sum(filled):.1%}")]
    places: dict[int, int] = {}
    for ranks in _RANKS:
        plan = pack(rows, budget, ranks, config.sampling.temperature)
        if len({len(part) for part in plan}) != 1:
            raise BenchError(
                f"ranks have {[len(part) for part in plan]} microbatches: they must have as many each"
            )
        places[ranks] = sum(one.token_ids.size for part in plan for one in part)
        lines.append(
            ("learner.batch.pack", f"{ranks}", f"{len(plan[0])}", f"{1 - tokens / places[ranks]:.1%}")
        )
    note = f"{1 - tokens / places[1]:.1%} of what goes through the model is padding (goal: under 10 %), {1 - tokens / sum(filled):.1%} by sort and fill"
    case = Case(
        "padding",
        "tokens",
        "with padding",
        "tokens",
        (float(tokens),),
        (float(places[1]),),
        "candidate/baseline",
        PADDING_GOAL,
        note,
    )
    title = f"Padding of {len(rows)} rows, {tokens} tokens, in microbatches of at most {budget}"
    return case, Table(title, ("packing", "ranks", "microbatches a rank", "padding"), tuple(lines))


def sort_and_fill(rows: Sequence[Row], budget: int) -> list[int]:
    """The simple packing: from the longest row on, as many as fit. Sizes of the microbatches, padding included."""
    batches: list[list[int]] = []
    for length in sorted((len(row.segment.token_ids) for row in rows), reverse=True):
        if batches and (len(batches[-1]) + 1) * batches[-1][0] <= budget:
            batches[-1].append(length)
        else:
            batches.append([length])
    return [len(batch) * batch[0] for batch in batches]


def _added_work(learner: Learner, basis: Basis) -> float:
    """Multiplications of the Deltas over those of the layers' own weights, forward and backward (no gradient of B or A, none of frozen weights)."""
    layers = {
        name: value.numel()
        for name, value in learner.weights(trainable_only=False).items()
        if ".layers." in name
    }
    trained = sum(layers[name] for name in learner.weights(trainable_only=True) if name in layers)
    delta = basis.parameters + sum(matrix.numel() for matrix in basis.a.values())
    return 2 * delta / (sum(layers.values()) + 2 * trained)


def _case(name: str, clock: Literal["cpu_s", "wall_s"], timings: dict[str, list[Timing]], note: str) -> Case:
    without, under = (
        tuple(float(getattr(one, clock)) for one in timings[side]) for side in ("without", "with")
    )
    return Case(
        name,
        "Deltas taken away",
        "a Delta per segment",
        "s",
        without,
        under,
        "candidate/baseline",
        STEP_GOAL,
        note,
    )


def _head_sizes(quick: bool) -> tuple[HeadSize, ...]:
    if quick:
        return (HeadSize(tokens=512, width=32, vocabulary=30_000, trained=False),)
    # 1,024 tokens: enough to tell the ways apart; more only take longer
    return tuple(
        HeadSize(1024, 576, vocabulary, trained) for vocabulary in _VOCABULARIES for trained in (False, True)
    )
