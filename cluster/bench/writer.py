"""The batched writer against a sequential PEFT + torch.optim loop that gives the same B.

Compared are seconds, FLOPs, and the share of the machine's matmul rate, for two writes:

    plain      the paper's write
    addressed  the same, where each card is also learnt behind another, and other replies are preserved
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from actors.environments.recall import RecallEnvironment
from actors.episodes.preservation import Prompt, PromptMaker, in_turn
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.text.chat_template import ChatFormat, open_chat
from actors.text.flashcards import write_examples
from actors.types import WriteExample, WriteRequest
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.steps import minibatches, preserved_in_turn
from actors.write.writer import BatchedWriter
from cluster.bench.harness import in_turns, timed
from cluster.bench.machine import matmul_rate
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from cluster.measure.report import Table
from configs.schema import FastWeightsConfig, ModelConfig, PreserveConfig, RecallConfig, WriteConfig

WrittenB = Mapping[str, NDArray[np.float32]]

_IGNORED = -100  # transformers leaves such labels out of the loss

Kind = Literal["plain", "addressed"]

CARDS = 8
EPISODES = ((1, Goal("at least", 5)), (8, Goal("at least", 6)), (32, Goal("at least", 6)))
COST = Goal("at most", 2)  # of the addressed write over the plain one
WRITES: Mapping[Kind, WriteConfig] = {
    "plain": WriteConfig(),
    "addressed": WriteConfig(depths=(1,), preserve=PreserveConfig(weight=1.0)),
}
# The largest difference of B from the loop in float64. The loop in float32 rounds its loss by nearly as much.
MOST_DIFFERENCE = 1e-6
# The loop's episodes are independent, so its time for more of them is this sample's time, scaled.
LOOP_EPISODES = 2
MANY, MANY_REPEATS = 32, 3  # a write of so many episodes takes a minute on one core


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Writer and loop on the same weights, basis and settings (the paper's: SGD 5e-4, 5 epochs).

    ``exact`` is the loop in float64. ``first``: an episode that is not measured.
    """

    basis: Basis
    loop: PeftLoop
    exact: PeftLoop
    model: FrozenLlama
    config: WriteConfig
    first: WriteRequest

    def writer(self) -> BatchedWriter:
        """A new writer: a writer does not read the same flashcards twice.

        One episode has written already, as in a run: replies that all episodes preserve are read once.
        """
        writer = BatchedWriter(self.model, self.basis, self.config)
        writer.write([self.first])
        return writer

    def timed(self, requests: Sequence[WriteRequest]) -> Timing:
        writer = self.writer()
        return timed(lambda: writer.write(requests))


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
    path = context.model_path
    basis = compute_basis_from_checkpoint(path, FastWeightsConfig(), seed=0)
    loop, exact = (PeftLoop(path, basis, kind, device) for kind in (dtype, torch.float64))
    model = read_model(path, "bfloat16" if cuda else "float32", device)
    sizes = EPISODES[:1] if context.quick else EPISODES
    requests = {kind: _requests(context, basis, sizes[-1][0] + 1, config) for kind, config in WRITES.items()}
    pairs = {
        kind: Pair(basis, loop, exact, model, config, requests[kind].pop()) for kind, config in WRITES.items()
    }
    rate = matmul_rate(1024, 576, 1536, dtype, device)
    cases: list[Case] = []
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {"matmul_gflops": rate / 1e9}
    for count, goal in sizes:
        repeats = context.repeats if count < MANY else min(context.repeats, MANY_REPEATS)
        asked = {kind: requests[kind][:count] for kind in WRITES}
        timings = _measure(pairs, asked, repeats)
        cases += _cases(count, goal, timings)
        for kind, pair in pairs.items():
            work = _compare(pair, asked[kind], strict=not cuda)
            best = min(timing.wall_s for timing in timings[_side("writer", kind)])
            share, end = work.writer_flops / best / rate, "" if kind == "plain" else f"_{kind}"
            figures |= {f"difference_{count}{end}": work.difference, f"rate_share_{count}{end}": share}
            rows.append((str(count), kind, *_cells(work, share)))
    return Outcome(tuple(cases), (_work_table(rows, rate),), figures=figures)


def _side(name: str, kind: Kind) -> str:
    return f"{name}, {kind}"


def _cells(work: Work, share: float) -> tuple[str, ...]:
    differences = (f"{work.difference:.1e}", f"{work.loop_difference:.1e}")
    flops = (f"{work.writer_flops / 1e9:.1f}", f"{work.loop_flops / 1e9:.1f}")
    return (*differences, *flops, f"{work.loop_flops / work.writer_flops:.2f}", f"{share:.2f}")


def _work_table(rows: Sequence[tuple[str, ...]], rate: float) -> Table:
    differences = ("writer |dB|", "loop |dB|")
    flops = ("writer GFLOP", "loop GFLOP", "loop/writer", "writer's share of the matmul rate")
    title = (
        "Work (|dB|: largest difference from the loop in float64; "
        f"matmul rate of this machine: {rate / 1e9:.1f} GFLOP/s)"
    )
    return Table(title, ("episodes", "write", *differences, *flops), tuple(rows))


def _requests(context: Context, basis: Basis, count: int, config: WriteConfig) -> list[WriteRequest]:
    """Episodes of the recall environment, each with the gold flashcards of eight facts."""
    chat = open_chat(context.model_path, ModelConfig())
    environment = RecallEnvironment(RecallConfig(sessions=1, facts_per_session=CARDS, questions=CARDS))
    prompt, limit, preserve = environment.system_prompt, config.max_example_tokens, config.preserve
    maker = PromptMaker(chat, prompt, environment, preserve)
    requests = []
    for task in islice(environment.tasks("train", 0, 0), count):
        text = " ".join(task.payload["sessions"])
        cards = environment.demonstrate_flashcards(task, text, question_blind=False)
        examples = write_examples(cards, (), prompt, chat, config.depths, limit)
        pool, beside = (
            [_reply(p, chat) for p in prompts] for prompts in (maker.pool(0), maker.beside(cards))
        )
        preserved = in_turn(pool, beside, preserve.per_step) if preserve.weight else ()
        requests.append(WriteRequest(task.id, zero(basis), examples, preserved))
    return requests


def _reply(prompt: Prompt, chat: ChatFormat) -> WriteExample:
    """A stand-in for the policy's own reply, as long: what it says costs nothing and changes no equality."""
    text = chat.encode(" ".join(["I have not been told that, so I cannot say it."] * 4))
    return WriteExample(prompt.ids, text[: prompt.tokens])


def _measure(
    pairs: Mapping[Kind, Pair], requests: Mapping[Kind, Sequence[WriteRequest]], repeats: int
) -> dict[str, list[Timing]]:
    """The timings of loop and writer for each kind of write, all four in turns."""
    works: dict[str, Callable[[], Timing]] = {}
    for kind, pair in pairs.items():
        works[_side("loop", kind)] = partial(_timed_loop, pair, requests[kind])
        works[_side("writer", kind)] = partial(pair.timed, requests[kind])
    return in_turns(works, repeats)


def _timed_loop(pair: Pair, requests: Sequence[WriteRequest]) -> Timing:
    sample = requests[:LOOP_EPISODES]
    factor = len(requests) / len(sample)
    timing = timed(lambda: pair.loop.write(sample, pair.config))
    return Timing(timing.wall_s * factor, timing.cpu_s * factor)


def _cases(count: int, goal: Goal, timings: Mapping[str, Sequence[Timing]]) -> list[Case]:
    """Compare wall seconds, which the goals are about, and CPU seconds."""
    scaled = f"the loop's time for more than {LOOP_EPISODES} episodes is that of {LOOP_EPISODES}, scaled"
    note = f"{CARDS} flashcards each; {scaled}"
    name = f"{count} episode{'s' if count > 1 else ''}"

    def values(side: str, clock: str) -> tuple[float, ...]:
        return tuple(getattr(timing, clock) for timing in timings[side])

    def beside_loop(title: str, kind: Kind, clock: str, wanted: Goal | None, text: str) -> Case:
        loop, writer = (values(_side(side, kind), clock) for side in ("loop", "writer"))
        unit = "s" if clock == "wall_s" else "CPU s"
        return Case(title, "PEFT loop", "writer", unit, loop, writer, "baseline/candidate", wanted, text)

    plain, addressed = (values(_side("writer", kind), "wall_s") for kind in WRITES)
    terms = "each card also behind another, and preserved replies"
    both = ("plain", "addressed")
    return [
        beside_loop(name, "plain", "wall_s", goal, note),
        beside_loop(f"{name}, CPU", "plain", "cpu_s", None, ""),
        beside_loop(f"{name}, addressed", "addressed", "wall_s", goal, f"{terms}, in both"),
        beside_loop(f"{name}, addressed, CPU", "addressed", "cpu_s", None, ""),
        Case(f"{name}, cost", *both, "s", plain, addressed, "candidate/baseline", COST, terms),
    ]


def _compare(pair: Pair, requests: Sequence[WriteRequest], strict: bool) -> Work:
    """Measure the work of both. With ``strict``, BenchError if they differ: speed would then mean nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    sample = requests[:LOOP_EPISODES]
    writer = pair.writer()
    with FlopCounterMode(display=False) as counter:
        results = writer.write(requests)
    with FlopCounterMode(display=False) as loop_counter:
        by_loop = pair.loop.write(sample, pair.config)
    exact = pair.exact.write(sample, pair.config)
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


class PeftLoop:
    """A write without Engram: stock PEFT and torch.optim, one episode after the other.

    An episode's flashcards are one padded batch: full forward with all logits, loss on the answers, backward,
    step. A is frozen at the basis. Preserved replies are a second padded batch of the same step.
    """

    def __init__(self, model_path: Path, basis: Basis, dtype: torch.dtype, device: torch.device) -> None:
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
        self._device = device
        self._b: dict[str, torch.nn.Parameter] = {}
        self._base: dict[WriteExample, torch.Tensor] = {}  # log-probs of preserved replies
        wide = torch.promote_types(dtype, torch.float32)  # adapters of a bfloat16 model are float32
        for name in basis.modules:
            layer = self._model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data = basis.a[name].to(device, wide)
            layer.lora_A["default"].weight.requires_grad_(False)
            self._b[name] = layer.lora_B["default"].weight
            self._b[name].data = self._b[name].data.to(wide)

    def write(self, requests: Sequence[WriteRequest], config: WriteConfig) -> list[WrittenB]:
        """The B of each request; every request starts from B = 0."""
        return [self._write(request, config) for request in requests]

    def _write(self, request: WriteRequest, config: WriteConfig) -> WrittenB:
        examples = request.examples
        for parameter in self._b.values():
            parameter.data.zero_()
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
        optimizer = kind(list(self._b.values()), lr=config.learning_rate)
        in_turn, step = preserved_in_turn(request, config), 0
        for epoch in range(config.epochs):
            for places in minibatches(range(len(examples)), config.batch_size, request.seed, epoch):
                optimizer.zero_grad()
                loss = self._loss(self._batch([examples[place] for place in places]))
                if request.preserved:
                    size = min(config.preserve.per_step, len(request.preserved))
                    replies = in_turn[step * size : (step + 1) * size]
                    loss = loss + config.preserve.weight * self._kl(replies)
                loss.backward()
                optimizer.step()
                step += 1
        return {name: parameter.detach().float().cpu().numpy().copy() for name, parameter in self._b.items()}

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """transformers' own loss, except that the logits of a float64 model stay float64."""
        logits = self._logits(batch).flatten(0, 1)
        return functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=_IGNORED)

    def _kl(self, replies: Sequence[WriteExample]) -> torch.Tensor:
        """KL(model without adapters || model): the mean over replies of their mean nats a token."""
        base = [self._base_of(reply) for reply in replies]
        pairs = zip(base, self._logprobs(replies), strict=True)
        kls = [functional.kl_div(now, kept, reduction="batchmean", log_target=True) for kept, now in pairs]
        return torch.stack(kls).mean()

    def _base_of(self, reply: WriteExample) -> torch.Tensor:
        """Computed once: the model without adapters does not change."""
        if reply not in self._base:
            with torch.no_grad(), self._model.disable_adapter():
                (self._base[reply],) = self._logprobs([reply])
        return self._base[reply]

    def _logprobs(self, replies: Sequence[WriteExample]) -> list[torch.Tensor]:
        """[tokens, vocabulary] of each reply."""
        batch = self._batch(replies)
        shown = batch["labels"][:, 1:] != _IGNORED
        rows = self._logits(batch)[shown].log_softmax(-1)
        return list(rows.split([len(reply.answer_ids) for reply in replies]))

    def _logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 or wider, without the last position's."""
        output = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits: torch.Tensor = output.logits[:, :-1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

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
