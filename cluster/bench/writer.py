"""The batched writer against a sequential PEFT + torch.optim loop that gives the same B.

Compared are seconds, FLOPs, and the share of the machine's matmul rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from actors.environments.recall import RecallEnvironment
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import WriteExample, WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.writer import BatchedWriter
from cluster.bench.harness import in_turns, timed
from cluster.bench.machine import matmul_rate
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table
from configs.schema import FastWeightsConfig, RecallConfig, WriteConfig

WrittenB = Mapping[str, NDArray[np.float32]]

CARDS = 8
EPISODES = ((1, Goal("at least", 5)), (8, Goal("at least", 6)), (32, Goal("at least", 6)))
# The largest difference of B from the loop in float64. The loop in float32 rounds its loss by nearly as much.
MOST_DIFFERENCE = 1e-6
# The loop's episodes are independent, so its time for more of them is this sample's time, scaled.
LOOP_EPISODES = 2
MANY, MANY_REPEATS = 32, 3  # a write of so many episodes takes a minute on one core


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Writer and loop on the same weights, basis and settings (the paper's: SGD 5e-4, 5 epochs).

    ``exact`` is the loop in float64.
    """

    basis: Basis
    loop: PeftLoop
    exact: PeftLoop
    model: FrozenLlama
    config: WriteConfig

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """Write with a new writer: a writer does not read the same flashcards twice."""
        return BatchedWriter(self.model, self.basis, self.config).write(requests)


@dataclass(frozen=True, slots=True)
class Work:
    """Largest |dB| of each from the loop in float64, and the FLOPs of the matrix products of each."""

    difference: float
    loop_difference: float
    writer_flops: float
    loop_flops: float


def run(context: Context) -> Outcome:
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    config, path = WriteConfig(), context.model_path
    basis = compute_basis_from_checkpoint(path, FastWeightsConfig(), seed=0)
    pair = Pair(
        basis,
        loop=PeftLoop(path, basis, config, dtype, device),
        exact=PeftLoop(path, basis, config, torch.float64, device),
        model=read_model(path, "bfloat16" if cuda else "float32", device),
        config=config,
    )
    sizes = EPISODES[:1] if context.quick else EPISODES
    requests = _requests(context, basis, sizes[-1][0])
    rate = matmul_rate(1024, 576, 1536, dtype, device)
    cases: list[Case] = []
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {"matmul_gflops": rate / 1e9}
    for count, goal in sizes:
        repeats = context.repeats if count < MANY else min(context.repeats, MANY_REPEATS)
        timings = _measure(pair, requests[:count], repeats)
        work = _compare(pair, requests[:count], strict=not cuda)
        cases += _cases(count, goal, timings)
        share = work.writer_flops / min(timing.wall_s for timing in timings["writer"]) / rate
        figures |= {f"difference_{count}": work.difference, f"rate_share_{count}": share}
        rows.append(_row(count, work, share))
    return Outcome(tuple(cases), (_work_table(rows, rate),), figures=figures)


def _row(count: int, work: Work, share: float) -> tuple[str, ...]:
    differences = (f"{work.difference:.1e}", f"{work.loop_difference:.1e}")
    flops = (f"{work.writer_flops / 1e9:.1f}", f"{work.loop_flops / 1e9:.1f}")
    return (str(count), *differences, *flops, f"{work.loop_flops / work.writer_flops:.2f}", f"{share:.2f}")


def _work_table(rows: Sequence[tuple[str, ...]], rate: float) -> Table:
    differences = ("writer |dB|", "loop |dB|")
    flops = ("writer GFLOP", "loop GFLOP", "loop/writer", "writer's share of the matmul rate")
    title = (
        "Work (|dB|: largest difference from the loop in float64; "
        f"matmul rate of this machine: {rate / 1e9:.1f} GFLOP/s)"
    )
    return Table(title, ("episodes", *differences, *flops), tuple(rows))


def _requests(context: Context, basis: Basis, count: int) -> list[WriteRequest]:
    """Episodes of the recall environment, each with the gold flashcards of eight facts."""
    from transformers import AutoTokenizer

    chat = ChatFormat(AutoTokenizer.from_pretrained(context.model_path))
    environment = RecallEnvironment(RecallConfig(sessions=1, facts_per_session=CARDS, questions=CARDS))
    requests = []
    for task in islice(environment.tasks("train", 0, 0), count):
        text = " ".join(task.payload["sessions"])
        cards = environment.demonstrate_flashcards(task, text, question_blind=False)
        examples = tuple(write_example(card, environment.system_prompt, chat) for card in cards)
        requests.append(WriteRequest(task.id, zero(basis), examples))
    return requests


def _measure(pair: Pair, requests: Sequence[WriteRequest], repeats: int) -> dict[str, list[Timing]]:
    sample = requests[:LOOP_EPISODES]
    factor = len(requests) / len(sample)

    def loop() -> Timing:
        timing = timed(lambda: pair.loop.write(sample))
        return Timing(timing.wall_s * factor, timing.cpu_s * factor)

    return in_turns({"loop": loop, "writer": lambda: timed(lambda: pair.write(requests))}, repeats)


def _cases(count: int, goal: Goal, timings: Mapping[str, Sequence[Timing]]) -> list[Case]:
    """Compare wall seconds, which the goal is about, and CPU seconds."""
    scaled = f"the loop's time for more than {LOOP_EPISODES} episodes is that of {LOOP_EPISODES}, scaled"
    note = f"{CARDS} flashcards each; {scaled}"
    name = f"{count} episode{'s' if count > 1 else ''}"

    def case(title: str, clock: str, unit: str, wanted: Goal | None, text: str) -> Case:
        loop, writer = (
            tuple(getattr(timing, clock) for timing in timings[side]) for side in ("loop", "writer")
        )
        return Case(title, "PEFT loop", "writer", unit, loop, writer, "baseline/candidate", wanted, text)

    return [case(name, "wall_s", "s", goal, note), case(f"{name}, CPU", "cpu_s", "CPU s", None, "")]


def _compare(pair: Pair, requests: Sequence[WriteRequest], strict: bool) -> Work:
    """Measure the work of both. With ``strict``, BenchError if they differ: speed would then mean nothing."""
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
            f"the writer's B differs from the exact B by {difference:.1e}, more than {MOST_DIFFERENCE:.0e}: "
            "its speed means nothing"
        )
    loop_flops = float(loop_counter.get_total_flops()) * len(requests) / len(sample)
    return Work(difference, _difference(by_loop, exact), float(counter.get_total_flops()), loop_flops)


def _difference(left: Sequence[WrittenB], right: Sequence[WrittenB]) -> float:
    pairs = [(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in b]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


# --- the baseline -----------------------------------------------------------------------------------------

_IGNORED = -100  # transformers leaves such labels out of the loss


class PeftLoop:
    """A write without Engram: stock PEFT and torch.optim, one episode after the other.

    An episode's flashcards are one padded batch: full forward with all logits, loss on the answers, backward,
    step. A is frozen at the basis.
    """

    def __init__(
        self, model_path: Path, basis: Basis, config: WriteConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa")
        lora = LoraConfig(
            r=basis.rank,
            lora_alpha=basis.rank,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(basis.modules),
        )
        self._model: Any = get_peft_model(model.to(device), lora).eval()
        self._config, self._device = config, device
        self._b: dict[str, torch.nn.Parameter] = {}
        wide = torch.promote_types(dtype, torch.float32)  # adapters of a bfloat16 model are float32
        for name in basis.modules:
            layer = self._model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data = basis.a[name].to(device, wide)
            layer.lora_A["default"].weight.requires_grad_(False)
            self._b[name] = layer.lora_B["default"].weight
            self._b[name].data = self._b[name].data.to(wide)

    def write(self, requests: Sequence[WriteRequest]) -> list[WrittenB]:
        """The B of each request; every request starts from B = 0."""
        return [self._write(request) for request in requests]

    def _write(self, request: WriteRequest) -> WrittenB:
        config, examples = self._config, request.examples
        for parameter in self._b.values():
            parameter.data.zero_()
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
        optimizer = kind(list(self._b.values()), lr=config.learning_rate)
        starts = range(0, len(examples), config.batch_size)
        batches = [self._batch(examples[start : start + config.batch_size]) for start in starts]
        for _ in range(config.epochs):
            for batch in batches:
                optimizer.zero_grad()
                self._loss(batch).backward()
                optimizer.step()
        return {name: parameter.detach().float().cpu().numpy().copy() for name, parameter in self._b.items()}

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """transformers' own loss, except that the logits of a float64 model stay float64."""
        output = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits = output.logits[:, :-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return functional.cross_entropy(wide, batch["labels"][:, 1:].flatten(), ignore_index=_IGNORED)

    def _batch(self, examples: Sequence[WriteExample]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(example.prompt_ids + example.answer_ids) for example in examples]
        labels = [
            torch.tensor([_IGNORED] * len(example.prompt_ids) + list(example.answer_ids))
            for example in examples
        ]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
        }
        return {name: tensor.to(self._device) for name, tensor in batch.items()}
