"""The batched writer against a sequential PEFT + torch.optim loop that gives the same B: seconds, FLOPs, share of the machine's matmul rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from actors.environments.recall import RecallEnvironment
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.writer import BatchedWriter
from cluster.bench.harness import in_turns, timed
from cluster.bench.machine import matmul_rate
from cluster.bench.peft_loop import PeftLoop
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table
from configs.schema import FastWeightsConfig, RecallConfig, WriteConfig

CARDS = 8
EPISODES = ((1, Goal("at least", 5)), (8, Goal("at least", 6)), (32, Goal("at least", 6)))
MOST_DIFFERENCE = 1e-6  # of B, float32, against the loop in float64: in float32 the loop's own rounding of the loss is near that
LOOP_EPISODES = 2  # the loop's time for more is these, times what is left: its episodes have nothing to do with each other
MANY, MANY_REPEATS = 32, 3  # a write of so many takes a minute on one core


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The two that are compared, on the same weights, basis and settings (the paper's: SGD 5e-4, 5 epochs)."""

    basis: Basis
    loop: PeftLoop
    exact: PeftLoop
    model: FrozenLlama
    config: WriteConfig

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """By a new writer: one that met these flashcards before would not read them again."""
        return BatchedWriter(self.model, self.basis, self.config).write(requests)


@dataclass(frozen=True, slots=True)
class Work:
    """How far each is from the loop in float64 (largest |dB|), and the FLOPs of matrix products of each; the loop's scaled as its time is."""

    difference: float
    loop_difference: float
    writer_flops: float
    loop_flops: float


def run(context: Context) -> Outcome:
    cuda = torch.cuda.is_available()
    device, dtype, config = (
        torch.device("cuda" if cuda else "cpu"),
        torch.bfloat16 if cuda else torch.float32,
        WriteConfig(),
    )
    basis = compute_basis_from_checkpoint(context.model_path, FastWeightsConfig(), seed=0)
    model = read_model(context.model_path, "bfloat16" if cuda else "float32", device)
    loop = PeftLoop(context.model_path, basis, config, dtype, device)
    pair = Pair(
        basis, loop, PeftLoop(context.model_path, basis, config, torch.float64, device), model, config
    )
    sizes = EPISODES[:1] if context.quick else EPISODES
    requests = _requests(context, basis, sizes[-1][0])
    rate = matmul_rate(1024, 576, 1536, dtype, device)
    cases: list[Case] = []
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {"matmul_gflops": rate / 1e9}
    for count, goal in sizes:
        mine = requests[:count]
        timings = _measure(
            pair, mine, context.repeats if count < MANY else min(context.repeats, MANY_REPEATS)
        )
        work = _compare(pair, mine, strict=not cuda)
        cases += _cases(count, goal, timings)
        share = work.writer_flops / min(timing.wall_s for timing in timings["writer"]) / rate
        figures |= {f"difference_{count}": work.difference, f"rate_share_{count}": share}
        rows.append(
            (
                str(count),
                f"{work.difference:.1e}",
                f"{work.loop_difference:.1e}",
                f"{work.writer_flops / 1e9:.1f}",
                f"{work.loop_flops / 1e9:.1f}",
                f"{work.loop_flops / work.writer_flops:.2f}",
                f"{share:.2f}",
            )
        )
    header = (
        "episodes",
        "writer |dB|",
        "loop |dB|",
        "writer GFLOP",
        "loop GFLOP",
        "loop/writer",
        "writer's share of the matmul rate",
    )
    title = f"Work (|dB|: largest difference from the loop in float64; matmul rate of this machine: {rate / 1e9:.1f} GFLOP/s)"
    return Outcome(tuple(cases), (Table(title, header, tuple(rows)),), figures=figures)


def _requests(context: Context, basis: Basis, count: int) -> list[WriteRequest]:
    """Episodes of the recall environment: eight facts each, as the flashcards that would be demonstrated."""
    from transformers import AutoTokenizer

    chat = ChatFormat(AutoTokenizer.from_pretrained(context.model_path))
    environment = RecallEnvironment(RecallConfig(sessions=1, facts_per_session=CARDS, questions=CARDS))
    requests = []
    for task in islice(environment.tasks("train", 0, 0), count):
        cards = environment.demonstrate_flashcards(
            task, " ".join(task.payload["sessions"]), question_blind=False
        )
        examples = tuple(write_example(card, environment.system_prompt, chat) for card in cards)
        requests.append(WriteRequest(task.id, zero(basis), examples))
    return requests


def _measure(pair: Pair, requests: Sequence[WriteRequest], repeats: int) -> dict[str, list[Timing]]:
    sample = requests[:LOOP_EPISODES]
    factor = len(requests) / len(sample)

    def loop() -> Timing:
        once = timed(lambda: pair.loop.write(sample))
        return Timing(once.wall_s * factor, once.cpu_s * factor)

    return in_turns({"loop": loop, "writer": lambda: timed(lambda: pair.write(requests))}, repeats)


def _cases(count: int, goal: Goal, timings: Mapping[str, Sequence[Timing]]) -> list[Case]:
    """By wall seconds, which the goal is about, and by CPU seconds."""
    note = f"{CARDS} flashcards each; the loop's time for more than {LOOP_EPISODES} episodes is that of {LOOP_EPISODES}, scaled"
    name = f"{count} episode{'s' if count > 1 else ''}"

    def case(title: str, clock: str, unit: str, wanted: Goal | None, text: str) -> Case:
        loop, writer = (
            tuple(float(getattr(timing, clock)) for timing in timings[side]) for side in ("loop", "writer")
        )
        return Case(title, "PEFT loop", "writer", unit, loop, writer, "baseline/candidate", wanted, text)

    return [case(name, "wall_s", "s", goal, note), case(f"{name}, CPU", "cpu_s", "CPU s", None, "")]


def _compare(pair: Pair, requests: Sequence[WriteRequest], strict: bool) -> Work:
    """Raises BenchError where a comparison of speed would compare different results (float32)."""
    from torch.utils.flop_counter import FlopCounterMode

    sample = requests[:LOOP_EPISODES]
    with FlopCounterMode(display=False) as counter:
        results = pair.write(requests)
    with FlopCounterMode(display=False) as loop_counter:
        by_loop = pair.loop.write(sample)
    exact = pair.exact.write(sample)
    difference = _difference([result.weights.b for result in results[: len(sample)]], exact)
    if strict and difference > MOST_DIFFERENCE:
        raise BenchError(
            f"the writer's B differs from the exact one by {difference:.1e}, more than {MOST_DIFFERENCE:.0e}: its speed means nothing"
        )
    loop_flops = float(loop_counter.get_total_flops()) * len(requests) / len(sample)
    return Work(difference, _difference(by_loop, exact), float(counter.get_total_flops()), loop_flops)


def _difference(
    some: Sequence[Mapping[str, NDArray[np.float32]]], others: Sequence[Mapping[str, NDArray[np.float32]]]
) -> float:
    pairs = [(one[name], other[name]) for one, other in zip(some, others, strict=True) for name in other]
    return max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs)
