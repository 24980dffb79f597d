"""The write operator T: flashcards of many episodes -> the next B of each, as one batched computation.

Method: TMEM, arXiv 2606.04536: a few SFT steps on B alone, A and theta frozen, each write starting from the episode's current B. The loss is the mean
over the answer tokens of a minibatch; the optimizer's state starts fresh at every write (both unpublished: our choices). With a basis of
``train_a`` (an ablation: what LoRA usually does) the same steps move A too, with the same optimizer and learning rate. Optimizers: write_steps.py.

What makes it cheap, without changing the result (each episode gets what a PEFT + torch.optim loop of its own would give):

    episodes   one pass over all episodes' examples, each row under its own episode's B (batched matmul); losses are summed, so gradients stay apart
    cut model  what does not depend on B runs once per write, shared prompt tokens once per episode, no token is padding (cut_model.py)
    no copy    the weights are the engine's own where it shows them (engine_weights.py), else a checkpoint's (frozen_model.py)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.fast_weights.delta import Basis, BasisError, StackedWeights, stack
from actors.fast_weights.sensitivity import Sensitivity
from actors.protocols import WriterError
from actors.types import FastWeights, Probe, WriteExample, WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.optimizers import make_optimizer
from actors.write.upper_layers import Chunk, Reading, Row, UpperLayers
from configs.schema import WriteConfig

PROBE_PROMPT_TOKENS, PROBE_ANSWER_TOKENS = 3, 3
"""A probe is the end of a prompt and the beginning of its answer: it shows that the adapter acts, not what it remembers, and costs little."""
KNOWN = 0.01
"""Nats per token: what is written is known below it, and a loss that rises to less than this has not diverged."""


@dataclass(frozen=True, eq=False)
class _Run:
    """What the steps did, by episode. before: log-probs of each example under the request's weights. final: the new fast weights.

    failures: "" or why the run of that episode was stopped; its ``final`` is then what it started from.
    """

    before: list[list[Tensor]]
    final: StackedWeights
    steps: list[int]
    failures: list[str]


_Picked = Sequence[Sequence[int]]  # rows, a list for each episode
_Watch = Callable[[StackedWeights], None]


class _Pass:
    """The rows of one write; what does not depend on B is prepared once for each selection of them that steps use again and again."""

    def __init__(self, model: UpperLayers, reading: Reading) -> None:
        self._model, self._reading = model, reading
        self._prepared: dict[tuple[tuple[int, ...], ...], tuple[Chunk, ...]] = {}

    def score(self, picked: _Picked, weights: StackedWeights) -> list[list[Tensor]]:
        """Log-probs of the picked rows, a list for each episode. Adds to ``weights`` the gradient of each episode's mean loss over its answer
        tokens."""
        shares = [1 / sum(len(self._reading.rows[i].targets) for i in mine) for mine in picked for _ in mine]
        return _by_episode(self._model.score(self.prepared(picked), weights, shares), picked)

    def measure(self, picked: _Picked, weights: StackedWeights) -> list[list[Tensor]]:
        """The log-probs alone."""
        (flat,) = self._model.measure((self.prepared(picked), weights))
        return _by_episode(flat, picked)

    def prepared(self, picked: _Picked) -> tuple[Chunk, ...]:
        key = tuple(tuple(mine) for mine in picked)
        if key not in self._prepared:
            rows: list[Row] = [self._reading.rows[i] for mine in picked for i in mine]
            self._prepared[key] = self._model.prepare(self._reading, rows)
        return self._prepared[key]


def _by_episode(flat: Iterable[Tensor], picked: _Picked) -> list[list[Tensor]]:
    each = iter(flat)
    return [[next(each) for _ in mine] for mine in picked]


def _train(
    rows: _Pass,
    places: _Picked,
    start: StackedWeights,
    guard: Sequence[Sensitivity],
    config: WriteConfig,
    watch: _Watch,
) -> _Run:
    """All episodes step together; one that has had its epochs, or diverged, is left out of the next steps. ``places``: each episode's rows.

    ``watch`` is shown the fast weights of all episodes after each step: it must copy what it keeps.
    """
    trained, final = _copy(start), _copy(start)
    leaves, results = ([*one.b.values(), *one.a.values()] for one in (trained, final))
    batches = [
        [mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)] for mine in places
    ]
    totals = [config.epochs * len(mine) for mine in batches]
    optimizer = make_optimizer(trained, guard, config)
    steps, failures = [0] * len(places), [""] * len(places)
    several = [e for e in range(len(places)) if len(batches[e]) > 1]
    before = (
        dict(zip(several, rows.measure([places[e] for e in several], start), strict=True)) if several else {}
    )
    for step in range(max(totals)):
        active = [e for e in range(len(places)) if step < totals[e] and not failures[e]]
        if not active:
            break
        current = [batches[e][step % len(batches[e])] for e in active]
        optimizer.zero_grad()
        scores = dict(zip(active, rows.score(current, trained), strict=True))
        losses = [_loss(scores[e]) if e in scores else 0.0 for e in range(len(places))]
        optimizer.step(torch.tensor(losses, device=leaves[0].device))
        watch(trained)
        for e, logprobs in scores.items():
            steps[e] += 1
            if step == 0:
                before.setdefault(
                    e, logprobs
                )  # one minibatch holds all examples: its first forward is the measurement
            if not math.isfinite(losses[e]):
                failures[e] = f"the loss became {losses[e]} at step {steps[e]} of {totals[e]}"
            elif steps[e] == totals[e]:
                for result, leaf in zip(results, leaves, strict=True):
                    result[e] = leaf.detach()[e]
    return _Run([before[e] for e in range(len(places))], final, steps, failures)


def _copy(weights: StackedWeights) -> StackedWeights:
    b, a = ({name: matrix.clone() for name, matrix in side.items()} for side in (weights.b, weights.a))
    return StackedWeights(b, a)


def _behind(first: StackedWeights, second: StackedWeights) -> StackedWeights:
    """Those of n episodes, then those of n more."""
    b, a = (
        {name: torch.cat([one[name], other[name]]) for name in one}
        for one, other in ((first.b, second.b), (first.a, second.a))
    )
    return StackedWeights(b, a)


def _loss(logprobs: Sequence[Tensor]) -> float:
    """Mean nats per answer token."""
    return -float(torch.cat(list(logprobs)).double().mean())


class BatchedWriter:
    """FastWeightWriter over a frozen model, on the model's device. Not for concurrent threads; for one theta: after a refresh make another.

    An episode's result does not depend on its companions, up to float rounding of differently grouped matmuls. B, its gradient and the optimizer's
    state are float32, whatever the model's dtype.
    """

    def __init__(self, model: FrozenLlama, basis: Basis, config: WriteConfig) -> None:
        self._basis = basis
        self._config = config
        if config.optimizer == "natural" and not basis.sensitivity:
            raise BasisError(
                f"basis {basis.id} was made without fast_weights.sensitivity_rank, which write.optimizer=natural needs: start a run with it"
            )
        self._guard = [basis.sensitivity[name].to(model.device) for name in basis.d_out if basis.sensitivity]
        self._cut = UpperLayers(model, basis, config.chunk_tokens)

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """One result per request, in order; ``seconds`` is the wall time of the whole call. Raises WriterError, BasisError for unusable requests,
        which includes any request where ``write.epochs`` is 0: T is the identity then, there is no next revision to ask for.

        Rolled back (the request's own weights, no probe, the reason): a loss or B that is not finite at any time, or loss_after above
        ``max_loss_ratio`` x loss_before and ``KNOWN``. Both are over all examples of the request; loss_after of a diverged run may be inf or nan.
        The probe is taken from the shortest example: ``before`` under the request's weights, ``after`` under the new.
        """
        return self._write(requests, lambda weights: None) if requests else []

    def trace(self, request: WriteRequest) -> tuple[WriteResult, tuple[FastWeights, ...]]:
        """``write`` of one request, and the weights after each of its steps, the diverged ones too: the last are the result's if it is accepted."""
        steps: list[FastWeights] = []

        def keep(now: StackedWeights) -> None:
            steps.append(self._weights_of(now, 0, request.weights.revision + 1))

        (result,) = self._write([request], keep)
        return result, tuple(steps)

    def _write(self, requests: Sequence[WriteRequest], watch: _Watch) -> list[WriteResult]:
        started = time.perf_counter()
        for request in requests:
            self._check(request)
        owners = [(e, example) for e, request in enumerate(requests) for example in request.examples]
        probed = [_probe_of(request.examples) for request in requests]
        reading, probing = self._cut.read(owners, [*enumerate(probed), *enumerate(probed, len(probed))])
        rows = _Pass(self._cut, reading)
        places = [[i for i, (owner, _) in enumerate(owners) if owner == e] for e in range(len(requests))]
        start = stack(
            [request.weights for request in requests], self._basis, torch.float32, self._cut.model.device
        )
        run = _train(rows, places, start, self._guard, self._config, watch)
        under = (
            (rows.prepared(places), run.final),
            (self._cut.prepare(probing, probing.rows), _behind(start, run.final)),
        )
        scored, probes = self._cut.measure(*under)
        after = _by_episode(scored, places)
        seconds = time.perf_counter() - started
        pairs = zip(probed, probes[: len(probed)], probes[len(probed) :], strict=True)
        proofs = [
            Probe(one.prompt_ids + one.answer_ids, tuple(old.tolist()), tuple(new.tolist()))
            for one, old, new in pairs
        ]
        return [
            self._result(request, run, e, after[e], proofs[e], seconds) for e, request in enumerate(requests)
        ]

    def _check(self, request: WriteRequest) -> None:
        if self._config.epochs == 0:
            raise WriterError(
                f"write of episode {request.episode_id}: write.epochs=0 makes every write the identity: nothing may be asked of the writer"
            )
        longest = min(self._config.max_example_tokens, self._cut.model.shape.window or math.inf)
        if not request.examples:
            raise WriterError(
                f"write of episode {request.episode_id}: no examples; an empty write is the caller's to record"
            )
        for number, example in enumerate(request.examples):
            size = len(example.prompt_ids) + len(example.answer_ids)
            if not example.prompt_ids or not example.answer_ids:
                raise WriterError(
                    f"write of episode {request.episode_id}: example {number} needs a prompt and an answer of one token or more"
                )
            if size > longest:
                raise WriterError(
                    f"write of episode {request.episode_id}: example {number} has {size} tokens, at most {longest} are allowed; drop it"
                )

    def _result(
        self, request: WriteRequest, run: _Run, e: int, after: Sequence[Tensor], probe: Probe, seconds: float
    ) -> WriteResult:
        loss_before = _loss(run.before[e])
        loss_after = math.nan if run.failures[e] else _loss(after)
        weights = self._weights_of(run.final, e, request.weights.revision + 1)
        finite = all(bool(np.isfinite(matrix).all()) for matrix in (*weights.b.values(), *weights.a.values()))
        if reason := self._refusal(run.failures[e], loss_before, loss_after, finite):
            return WriteResult(
                request.weights, None, loss_before, loss_after, run.steps[e], seconds, "rolled_back", reason
            )
        return WriteResult(weights, probe, loss_before, loss_after, run.steps[e], seconds, "accepted", "")

    def _weights_of(self, stacked: StackedWeights, e: int, revision: int) -> FastWeights:
        b, a = (
            {name: matrix[e].detach().cpu().numpy().copy() for name, matrix in side.items()}
            for side in (stacked.b, stacked.a)
        )
        return FastWeights(self._basis.id, revision, b, a)

    def _refusal(self, failure: str, loss_before: float, loss_after: float, finite: bool) -> str:
        """Why a write is rolled back, in one line, or "" when it is accepted."""
        key = "step_kl" if self._config.optimizer == "natural" else "learning_rate"
        cure = f"lower write.{key}={getattr(self._config, key):g}"
        if failure:
            return f"{failure}; {cure}"
        if not (finite and math.isfinite(loss_before) and math.isfinite(loss_after)):
            return f"the fast weights or the loss are not finite after the last step (loss {loss_before:.4g} -> {loss_after:.4g}); {cure}"
        if loss_after > max(self._config.max_loss_ratio * loss_before, KNOWN):
            return f"the loss rose from {loss_before:.4g} to {loss_after:.4g}, past write.max_loss_ratio={self._config.max_loss_ratio:g}; {cure}"
        return ""


def _probe_of(examples: Sequence[WriteExample]) -> WriteExample:
    """From the shortest example: a receipt costs the engine a prefill."""
    shortest = min(examples, key=lambda example: len(example.prompt_ids) + len(example.answer_ids))
    return WriteExample(shortest.prompt_ids[-PROBE_PROMPT_TOKENS:], shortest.answer_ids[:PROBE_ANSWER_TOKENS])


def checkpoint_writer(
    model_path: str,
    basis: Basis,
    config: WriteConfig,
    dtype: Literal["float32", "bfloat16"],
    device: torch.device,
) -> BatchedWriter:
    """A writer with weights of its own, read from a Hugging Face folder: where no engine is at hand."""
    return BatchedWriter(read_model(model_path, dtype, device), basis, config)
