"""The learner: the cost of one Delta per segment, the memory of the head, the padding of its microbatches.

The learner is real (DeepSpeed, ZeRO 1, float32), on groups with the quickstart's shapes. A step with Deltas
and the same step without run on one learner in turns: the same tokens in the same rows. The head's log-probs
of many tokens, forward and backward, are compared in three ways, in a process for each size: full logits,
torch's chunked loss, ours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.peak_memory import take_peak
from actors.types import TrajectoryGroup
from cluster.bench.harness import child, in_turns, timed
from cluster.bench.machine import peak_above
from cluster.bench.scripted import QUICKSTART, recall_groups, without_deltas
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table
from configs.load import load_config
from configs.schema import RunConfig
from learner.advantage import estimator, score
from learner.batch import pack, rows_of
from learner.learner import Learner

Trainable = Literal["last_layers", "full"]
Way = Literal["full logits", "torch's chunked loss", "TokenHead"]

STEP_GOAL = Goal("at most", 1.05)
PADDING_GOAL = Goal("at most", 1 / 0.9)  # less than a tenth of what goes through the model is padding
WAYS: tuple[Way, ...] = ("full logits", "torch's chunked loss", "TokenHead")
VOCABULARIES = (49_152, 151_936)  # SmolLM2's and Qwen3's
# Tokens, about as many as TokenHead's. With these vocabularies torch picks a few, which is many times slower
# on CPU.
TORCH_CHUNK = 128
HEAD_S = 900.0
MIB = 2**20


def run(context: Context) -> Outcome:
    config = load_config(QUICKSTART, [])
    basis = compute_basis_from_checkpoint(context.model_path, config.fast_weights, config.seed)
    tasks, siblings = (1, 2) if context.quick else (config.train.tasks_per_step, config.train.group_size)
    groups = recall_groups(context.model_path, config, basis, tasks, siblings)
    parts: tuple[Trainable, ...] = ("last_layers", "full")
    trained = groups[: max(1, tasks // 2)]
    cases = [case for part in parts for case in step_cases(context, config, basis, trained, part)]
    table, figures = head(context)
    return Outcome((*cases, padding_case(groups, config)), (table,), figures=figures)


# --- a step -----------------------------------------------------------------------------------------------


def step_cases(
    context: Context, config: RunConfig, basis: Basis, groups: Sequence[TrajectoryGroup], trainable: Trainable
) -> tuple[Case, Case]:
    """Compare CPU seconds (steadier where others use the machine too) and wall seconds."""
    settings = replace(config.learner, trainable=trainable, learning_rate=1e-7, threads=context.threads)
    if context.quick:
        settings = replace(settings, trainable_layers=min(2, settings.trainable_layers))
    path, temperature = str(context.model_path), config.sampling.temperature
    learner = Learner(settings, config.objective, path, basis, config.seed, temperature, rank=0, world_size=1)
    bare = without_deltas(groups)
    report = learner.step(groups)
    if report.tokens != learner.step(bare).tokens or report.tokens == 0:
        raise BenchError("no comparison: the steps with and without Deltas evaluated other tokens, or none")
    timings = in_turns(
        {
            "without": lambda: timed(lambda: learner.step(bare)),
            "with": lambda: timed(lambda: learner.step(groups)),
        },
        context.repeats,
    )
    note = (
        f"{report.tokens} tokens in {report.microbatches} microbatches, {report.action_tokens} of them "
        f"sampled; the Deltas add {_added_work(learner, basis):.2%} to the multiplications of the layers: "
        "the floor of their cost"
    )
    return (
        _step_case(f"step, {trainable}, CPU", "cpu_s", timings, note),
        _step_case(f"step, {trainable}, wall", "wall_s", timings, ""),
    )


def _step_case(
    name: str, clock: Literal["cpu_s", "wall_s"], timings: dict[str, list[Timing]], note: str
) -> Case:
    without, under = (
        tuple(float(getattr(timing, clock)) for timing in timings[side]) for side in ("without", "with")
    )
    names = ("Deltas taken away", "a Delta per segment")
    return Case(name, *names, "s", without, under, "candidate/baseline", STEP_GOAL, note)


def _added_work(learner: Learner, basis: Basis) -> float:
    """Multiplications of the Deltas over those of the layers' own weights, forward and backward.

    No gradient of B or A is counted, and none of frozen weights.
    """
    layers = {
        name: value.numel()
        for name, value in learner.weights(trainable_only=False).items()
        if ".layers." in name
    }
    trained = sum(layers[name] for name in learner.weights(trainable_only=True) if name in layers)
    delta = basis.parameters + sum(matrix.numel() for matrix in basis.a.values())
    return 2 * delta / (sum(layers.values()) + 2 * trained)


def padding_case(groups: Sequence[TrajectoryGroup], config: RunConfig) -> Case:
    """Padding in the microbatches of a step, as the learner packs it for one rank."""
    estimate = estimator(config.objective)
    scored = [trajectory for group in groups for trajectory in score(group, estimate)]
    rows = rows_of(scored, config.objective.aggregate, skip_zero_advantage=True).rows
    (plan,) = pack(rows, config.learner.microbatch_tokens, 1, config.sampling.temperature)
    tokens = sum(len(row.segment.token_ids) for row in rows)
    places = sum(microbatch.token_ids.size for microbatch in plan)
    note = f"{1 - tokens / places:.1%} of what goes through the model is padding (goal: under 10 %)"
    values = ((float(tokens),), (float(places),))
    names = ("tokens", "with padding")
    return Case("padding", *names, "tokens", *values, "candidate/baseline", PADDING_GOAL, note)


# --- the head ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeadSize:
    """``trained``: the head's weight needs a gradient (learner.trainable=full), else none (last_layers)."""

    tokens: int
    width: int
    vocabulary: int
    trained: bool

    @property
    def state(self) -> str:
        return "trained" if self.trained else "frozen"


@dataclass(frozen=True, slots=True)
class HeadCost:
    """``peak``: bytes above states, weight and targets. ``total``: the sum of the log-probs."""

    peak: int
    wall_s: float
    cpu_s: float
    total: float


HeadCosts = Mapping[tuple[HeadSize, Way], HeadCost]


class Head:
    """A child process's random states and weight of one size."""

    def __init__(self, size: HeadSize, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._layer = torch.nn.Linear(size.width, size.vocabulary, bias=False).requires_grad_(size.trained)
        self._states = torch.randn(size.tokens, size.width).requires_grad_(True)
        self._targets = torch.randint(size.vocabulary, (size.tokens,))

    def measure(self, way: Way) -> HeadCost:
        """Run forward and backward once, after a small warm-up.

        Raises BenchError where peaks are unmeasurable.
        """
        self._run(way, slice(0, 2))  # imports, thread pools
        self._layer.weight.grad = self._states.grad = None

        def measured_run() -> tuple[float, float, float]:
            wall, cpu = time.perf_counter(), time.process_time()
            total = self._run(way, slice(None))
            return time.perf_counter() - wall, time.process_time() - cpu, total

        (wall_s, cpu_s, total), peak = peak_above(measured_run)
        self._layer.weight.grad = self._states.grad = None  # else the next way would find them in memory
        return HeadCost(peak, wall_s, cpu_s, total)

    def _run(self, way: Way, part: slice) -> float:
        import torch
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy

        from learner.head import TokenHead

        states, targets, weight = self._states[part], self._targets[part], self._layer.weight
        if way == "TokenHead":
            logp = TokenHead(self._layer)(states, targets, 1.0)[0]
        elif way == "full logits":
            logp = self._layer(states).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        else:
            options = LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK)
            logp = -linear_cross_entropy(states, weight, targets, reduction="none", options=options)
        total: torch.Tensor = logp.sum()
        total.backward()
        return float(total.detach())


def head(context: Context) -> tuple[Table, dict[str, float]]:
    """Measure the memory of the head. Where peaks are unmeasurable, the table says why."""
    if reason := take_peak().problem:
        title = "Log-probs of many tokens, forward and backward: not measured"
        return Table(title, ("reason",), ((reason,),)), {}
    costs = _head_costs(_head_sizes(context.quick), context.threads)
    figures = {
        f"head_peak_mib {way} {size.vocabulary} {size.state}": cost.peak / MIB
        for (size, way), cost in costs.items()
    }
    return _head_table(costs), figures


def _head_sizes(quick: bool) -> tuple[HeadSize, ...]:
    if quick:
        return (HeadSize(tokens=512, width=32, vocabulary=30_000, trained=False),)
    # 1,024 tokens tell the ways apart; more only take longer.
    return tuple(
        HeadSize(1024, 576, vocabulary, trained)
        for vocabulary, trained in product(VOCABULARIES, (False, True))
    )


def _head_costs(sizes: Sequence[HeadSize], threads: int) -> HeadCosts:
    """Measure every way at every size. Raises BenchError when two ways disagree by more than rounding."""
    costs: dict[tuple[HeadSize, Way], HeadCost] = {}
    for size in sizes:
        with child(f"log-probs at {size.vocabulary}", Head, (size, threads)) as process:
            costs |= {(size, way): process.call("measure", (way,), HEAD_S) for way in WAYS}
    for (size, way), cost in costs.items():
        plain = costs[size, "full logits"].total
        if abs(cost.total - plain) > 1e-4 * abs(plain):
            raise BenchError(
                f"{way} at {size}: the log-probs sum to {cost.total}, full logits to {plain}; "
                "learner/head.py is wrong"
            )
    return costs


def _head_table(costs: HeadCosts) -> Table:
    rows = []
    for (size, way), cost in costs.items():
        plain = costs[size, "full logits"]
        memory = (f"{cost.peak / MIB:.0f}", f"{cost.peak / plain.peak:.2f}")
        seconds = (f"{cost.cpu_s:.2f}", f"{cost.cpu_s / plain.cpu_s:.2f}")
        rows.append((f"{size.vocabulary}", size.state, way, *memory, *seconds))
    memory_header = ("peak MiB above inputs", "of full logits")
    header = ("vocabulary", "head", "log-probs by", *memory_header, "CPU s", "of full logits")
    size = next(iter(costs))[0]
    title = f"Log-probs of {size.tokens:,} tokens at width {size.width}, forward and backward, float32"
    return Table(title, header, tuple(rows))
