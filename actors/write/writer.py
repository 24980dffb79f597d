"""The write operator T: flashcards of many episodes -> the next B of each, as one batched computation.

Method: TMEM, arXiv 2606.04536: a few SFT steps on B alone; A and theta are frozen; each write starts from the
episode's current B. The loss is the mean over the answer tokens of a minibatch, and the optimizer's state
starts fresh at every write (both are unpublished: our choices). A request may also name replies that the
write leaves as they were (steps.py). With a basis of ``train_a`` (an ablation: what LoRA usually does) the
same steps move A too, with the same optimizer and learning rate.

Each episode gets what a PEFT + torch.optim loop of its own would give. What makes that cheap:

    episodes     one pass over all episodes' examples, each row under its own episode's B (grouped matmul);
                 losses are summed, so gradients stay apart
    layers       the lower ones run once per write, the upper ones once per step (lower_layers.py,
                 upper_layers.py)
    no copy      the weights are the engine's own where it shows them (actors/engine/writer.py), else a
                 checkpoint's (frozen_llama.py)
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.fast_weights.delta import Basis, BasisError, StackedWeights, stack, zero
from actors.protocols import WriterError
from actors.types import FastWeights, Probe, WriteExample, WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.lower_layers import LowerLayers, Row
from actors.write.steps import (
    OnStep,
    Plan,
    Rows,
    Trained,
    by_episode,
    mean_loss,
    preserved_by,
    preserved_in_turn,
    train,
)
from actors.write.upper_layers import UpperLayers
from configs.schema import WriteConfig

_KEPT_TOKENS = 512  # 100 MB at a vocabulary of 49k, 310 MB at 152k

PROBE_PROMPT_TOKENS, PROBE_ANSWER_TOKENS = 3, 3
"""A probe is the end of a prompt and the beginning of its answer.

It shows that the adapter acts, not what it remembers, and costs little.
"""
KNOWN = 0.01
"""Nats per token. A text below it is known, so a loss that rises to less than this has not diverged."""


def _behind(first: StackedWeights, second: StackedWeights) -> StackedWeights:
    """The fast weights of n episodes, then those of m more."""
    b, a = (
        {name: torch.cat([matrix, behind[name]]) for name, matrix in front.items()}
        for front, behind in ((first.b, second.b), (first.a, second.a))
    )
    return StackedWeights(b, a)


class BatchedWriter:
    """FastWeightWriter over a frozen model, on the model's device.

    Not for concurrent threads. It is for one theta: after a refresh make another. An episode's result does
    not depend on its companions, up to float rounding of differently grouped matmuls. B, its gradient and the
    optimizer's state are float32, whatever the model's dtype.
    """

    def __init__(self, model: FrozenLlama, basis: Basis, config: WriteConfig) -> None:
        if (config.optimizer == "natural" or config.null_space) and not basis.sensitivity:
            needs = (
                f"write.null_space={config.null_space}" if config.null_space else "write.optimizer=natural"
            )
            raise BasisError(
                f"basis {basis.id} was made without fast_weights.sensitivity_rank, "
                f"which {needs} needs: start a run with it"
            )
        self._model, self._basis, self._config = model, basis, config
        self._sensitivities = [
            basis.sensitivity[name].to(model.device) for name in basis.d_out if basis.sensitivity
        ]
        self._lower = LowerLayers(model, basis.first_layer, config.chunk_tokens)
        self._upper = UpperLayers(model, basis, config.chunk_tokens, config.hard_below)
        self._preserved = PreservedReplies(self._upper, basis, model.device)

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """One result per request, in order; ``seconds`` is the wall time of the whole call.

        Raises WriterError or BasisError for an unusable request. Any request is unusable where
        ``write.epochs`` is 0: T is the identity then, and there is no next revision to ask for.

        A write is rolled back (the request's own weights, no probe, the reason) in two cases: a loss or B is
        not finite at any time, or loss_after is above ``max_loss_ratio`` x loss_before and above ``KNOWN``.
        Both losses are over all examples of the request; loss_after of a diverged run may be inf or nan. The
        probe is taken from the shortest example: ``before`` under the request's weights, ``after`` under the
        new.
        """
        return self._write(requests, lambda weights: None) if requests else []

    def trace(self, request: WriteRequest) -> tuple[WriteResult, tuple[FastWeights, ...]]:
        """Write one request, and keep the weights after each of its steps, those of a diverged write too.

        The last of them are the result's, if the write is accepted.
        """
        steps: list[FastWeights] = []

        def keep(now: StackedWeights) -> None:
            steps.append(self._weights_of(now, 0, request.weights.revision + 1))

        (result,) = self._write([request], keep)
        return result, tuple(steps)

    def _write(self, requests: Sequence[WriteRequest], on_step: OnStep) -> list[WriteResult]:
        started = time.perf_counter()
        for request in requests:
            self._check(request)
        owned = [(e, example) for e, request in enumerate(requests) for example in request.examples]
        in_turn = [preserved_in_turn(request, self._config) for request in requests]
        # The same reply may come several times, so that it is preserved more often.
        kept = [(e, reply) for e, replies in enumerate(in_turn) for reply in dict.fromkeys(replies)]
        probed = [_probe_of(request.examples) for request in requests]
        # Each probe is there twice, for the old weights and for the new, so that one pass scores both.
        output, probe_output = self._lower.read(
            [*owned, *kept], [*enumerate(probed), *enumerate(probed, len(requests))]
        )
        taught, preserved = output.rows[: len(owned)], output.rows[len(owned) :]
        preserved_rows = self._preserved.rows(output.prefix, preserved)
        rows = Rows(self._upper, output.prefix, (*taught, *preserved_rows), self._config.preserve.weight)
        places = [[i for i, (owner, _) in enumerate(owned) if owner == e] for e in range(len(requests))]
        numbers = {pair: number for number, pair in enumerate(kept, start=len(owned))}
        plans = [
            Plan(places[e], [numbers[e, reply] for reply in in_turn[e]], request.seed)
            for e, request in enumerate(requests)
        ]
        weights = [request.weights for request in requests]
        start = stack(weights, self._basis, torch.float32, self._model.device)
        trained = train(rows, plans, start, self._sensitivities, self._config, on_step)
        scored, probes = self._upper.measure(
            (rows.prepared(places), trained.final),
            (self._upper.prepare(probe_output.prefix, probe_output.rows), _behind(start, trained.final)),
        )
        after = by_episode(scored, places)
        seconds = time.perf_counter() - started
        proofs = [
            Probe(probe.prompt_ids + probe.answer_ids, tuple(old.tolist()), tuple(new.tolist()))
            for probe, old, new in zip(probed, probes[: len(probed)], probes[len(probed) :], strict=True)
        ]
        return [
            self._result(request, plans[e], trained, e, after[e], proofs[e], seconds)
            for e, request in enumerate(requests)
        ]

    def _check(self, request: WriteRequest) -> None:
        place = f"write of episode {request.episode_id}"
        if self._config.epochs == 0:
            raise WriterError(
                f"{place}: write.epochs=0 makes every write the identity: nothing may be asked of the writer"
            )
        if not request.examples:
            raise WriterError(f"{place}: no examples; an empty write is the caller's to record")
        window = self._model.shape.window or math.inf
        longest = min(self._config.max_example_tokens, window)
        for kind, examples, limit in (
            ("example", request.examples, longest),
            ("preserved reply", request.preserved, window),
        ):
            for number, example in enumerate(examples):
                size = len(example.prompt_ids) + len(example.answer_ids)
                if not example.prompt_ids or not example.answer_ids:
                    raise WriterError(
                        f"{place}: {kind} {number} needs a prompt and an answer of one token or more"
                    )
                if size > limit:
                    raise WriterError(
                        f"{place}: {kind} {number} has {size} tokens, at most {limit} are allowed; drop it"
                    )

    def _result(
        self,
        request: WriteRequest,
        plan: Plan,
        trained: Trained,
        e: int,
        after: Sequence[Tensor],
        probe: Probe,
        seconds: float,
    ) -> WriteResult:
        loss_before, steps, failure = mean_loss(trained.before[e]), trained.steps[e], trained.failures[e]
        loss_after = math.nan if failure else mean_loss(after)
        weights = self._weights_of(trained.final, e, request.weights.revision + 1)
        finite = all(bool(np.isfinite(matrix).all()) for matrix in (*weights.b.values(), *weights.a.values()))
        if reason := self._refusal(failure, loss_before, loss_after, finite):
            return WriteResult(
                request.weights, None, loss_before, loss_after, steps, seconds, "rolled_back", reason
            )
        kl, used = trained.kls[e], preserved_by(plan, steps, self._config)
        return WriteResult(weights, probe, loss_before, loss_after, steps, seconds, "accepted", "", kl, used)

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
        ratio = self._config.max_loss_ratio
        if failure:
            return f"{failure}; {cure}"
        if not (finite and math.isfinite(loss_before) and math.isfinite(loss_after)):
            return (
                "the fast weights or the loss are not finite after the last step "
                f"(loss {loss_before:.4g} -> {loss_after:.4g}); {cure}"
            )
        if loss_after > max(ratio * loss_before, KNOWN):
            return (
                f"the loss rose from {loss_before:.4g} to {loss_after:.4g}, "
                f"past write.max_loss_ratio={ratio:g}; {cure}"
            )
        return ""


def _probe_of(examples: Sequence[WriteExample]) -> WriteExample:
    """The middle of the shortest example: a receipt costs the engine a prefill."""
    shortest = min(examples, key=lambda example: len(example.prompt_ids) + len(example.answer_ids))
    return WriteExample(shortest.prompt_ids[-PROBE_PROMPT_TOKENS:], shortest.answer_ids[:PROBE_ANSWER_TOKENS])


def checkpoint_writer(
    model_path: str,
    basis: Basis,
    config: WriteConfig,
    dtype: Literal["float32", "bfloat16"],
    device: torch.device,
) -> BatchedWriter:
    """A writer with weights of its own, read from a Hugging Face folder: for use without an engine."""
    return BatchedWriter(read_model(model_path, dtype, device), basis, config)


class PreservedReplies:
    """Remembers the newest distributions. For one theta, as the writer is."""

    def __init__(self, layers: UpperLayers, basis: Basis, device: torch.device) -> None:
        self._layers = layers
        self._nothing = stack([zero(basis)], basis, torch.float32, device)
        self._remembered: OrderedDict[WriteExample, Tensor] = OrderedDict()  # oldest first

    def rows(self, prefix: int, rows: Sequence[Row]) -> list[Row]:
        """Give ``rows`` the distributions that they keep. All begin with the same ``prefix`` tokens."""
        missing = {row.example: row for row in rows if row.example not in self._remembered}
        if missing:
            # All under episode 0: its Delta is the only one here, and it is 0.
            chunks = self._layers.prepare(prefix, [replace(row, episode=0) for row in missing.values()])
            made = self._layers.distributions(chunks, self._nothing)
            self._remembered.update(zip(missing, made, strict=True))
        for row in rows:
            self._remembered.move_to_end(row.example)
        based = [replace(row, base=self._remembered[row.example]) for row in rows]
        self._forget()
        return based

    def _forget(self) -> None:
        kept = sum(len(base) for base in self._remembered.values())
        while kept > _KEPT_TOKENS:
            _, oldest = self._remembered.popitem(last=False)
            kept -= len(oldest)
