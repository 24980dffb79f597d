"""The write operator T: flashcards of many episodes -> the next B of each, as one batched computation.

Method: TMEM, arXiv 2606.04536: a few SFT steps on B alone, A and theta frozen, each write starting from the episode's current B. The loss is the mean
over the answer tokens of a minibatch; the optimizer's state starts fresh at every write (both unpublished: our choices).

What makes it cheap, without changing the result (each episode gets what a PEFT + torch.optim loop of its own would give):

    episodes   one pass over all episodes' examples, each row under its own episode's B (batched matmul); losses are summed, so gradients stay apart
    cut model  what does not depend on B runs once per write, and shared prompt tokens once per episode (cut_model.py)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from actors.cut_model import CutModel, Row
from actors.fast_weights import Basis, stack
from actors.protocols import WriterError
from actors.types import FastWeights, Probe, WriteRequest, WriteResult
from configs.schema import WriteConfig

SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose decoder layer is h += attention(norm(h)); h += mlp(norm(h)): the cut below relies on it."""

_PROBE_TOKENS = 64


@dataclass(frozen=True, eq=False)
class _Run:
    """What the steps did, by episode. before: log-probs of each example under the request's weights. final: name -> [episodes, d_out, rank].

    failures: "" or why the run of that episode was stopped; its ``final`` is then what it started from.
    """

    before: list[list[Tensor]]
    final: dict[str, Tensor]
    steps: list[int]
    failures: list[str]


def _train(model: CutModel, prefix: Tensor, rows: Sequence[Sequence[Row]], start: Mapping[str, Tensor], config: WriteConfig) -> _Run:
    """All episodes step together; one that has had its epochs, or diverged, is left out of the next steps."""
    leaves = {name: b.clone().requires_grad_() for name, b in start.items()}
    final = {name: b.clone() for name, b in start.items()}
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam  # elementwise both: stacked episodes stay apart
    optimizer = kind(list(leaves.values()), lr=config.learning_rate)
    batches = [[mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)] for mine in rows]
    totals = [config.epochs * len(mine) for mine in batches]
    steps, failures = [0] * len(rows), [""] * len(rows)
    several = [e for e in range(len(rows)) if len(batches[e]) > 1]
    before = dict(zip(several, _score_episodes(model, prefix, [rows[e] for e in several], start), strict=True))
    for step in range(max(totals)):
        active = [e for e in range(len(rows)) if step < totals[e] and not failures[e]]
        current = [batches[e][step % len(batches[e])] for e in active]
        optimizer.zero_grad()
        scores = _score_episodes(model, prefix, current, leaves, learn=True)
        optimizer.step()
        for e, logprobs in zip(active, scores, strict=True):
            steps[e] += 1
            if step == 0:
                before.setdefault(e, logprobs)  # one minibatch holds all examples: its first forward is the measurement
            if not math.isfinite(loss := _loss(logprobs)):
                failures[e] = f"the loss became {loss} at step {steps[e]} of {totals[e]}"
            elif steps[e] == totals[e]:
                for name, leaf in leaves.items():
                    final[name][e] = leaf.detach()[e]
    return _Run([before[e] for e in range(len(rows))], final, steps, failures)


def _score_episodes(
    model: CutModel, prefix: Tensor, rows: Sequence[Sequence[Row]], b: Mapping[str, Tensor], learn: bool = False
) -> list[list[Tensor]]:
    """Log-probs by episode and example. With ``learn``, adds to ``b`` the gradient of each episode's mean loss over its answer tokens."""
    weights = [1 / sum(len(row.targets) for row in mine) for mine in rows for _ in mine]
    flat = iter(model.score(prefix, [row for mine in rows for row in mine], b, weights if learn else None))
    return [[next(flat) for _ in mine] for mine in rows]


def _loss(logprobs: Sequence[Tensor]) -> float:
    """Mean nats per answer token."""
    return -float(torch.cat(list(logprobs)).double().mean())


class BatchedWriter:
    """FastWeightWriter over a frozen Hugging Face causal LM. Not for concurrent threads.

    An episode's result does not depend on its companions, up to float rounding of differently padded batches. B, its gradient and the optimizer's
    state are float32, whatever the model's dtype.
    """

    def __init__(self, model: Any, basis: Basis, config: WriteConfig, pad_token_id: int) -> None:
        """``model``: a *ForCausalLM of SUPPORTED_MODELS, which this object now owns: in eval mode, frozen, hooked. Raises WriterError, BasisError.

        ``pad_token_id`` fills the right of shorter rows, where no real token looks.
        """
        if model.config.model_type not in SUPPORTED_MODELS:
            raise WriterError(f"model type {model.config.model_type!r} is not supported by the writer: use one of {', '.join(SUPPORTED_MODELS)}")
        if (attention := model.config._attn_implementation) not in ("sdpa", "eager"):
            raise WriterError(f"attention {attention!r} is not supported by the writer: load the model with attn_implementation='sdpa'")
        self._model = model.eval().requires_grad_(False)
        self._basis = basis
        self._config = config
        self._pad = pad_token_id
        self._cut = CutModel(model, basis, config.chunk_tokens)

    @classmethod
    def from_checkpoint(cls, model_path: str, basis: Basis, config: WriteConfig, dtype: Literal["float32", "bfloat16"]) -> Self:
        """A writer with its own copy of the model, on the CPU."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        return cls(model, basis, config, pad_token_id=model.config.pad_token_id or 0)

    def refresh(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a new theta by Hugging Face names; of tied tensors one name is enough. All is checked first. Raises WriterError."""
        named = dict(self._model.named_parameters(remove_duplicate=False))
        given = {id(named[name]) for name in tensors if name in named}
        problems = [f"{name} is missing" for name, parameter in named.items() if id(parameter) not in given]
        problems += [f"{name} is unknown" for name in tensors if name not in named]
        problems += [
            f"{name} has shape {tuple(tensor.shape)}, not {tuple(named[name].shape)}"
            for name, tensor in tensors.items()
            if name in named and tensor.shape != named[name].shape
        ]
        if problems:
            raise WriterError(f"refresh of the writer's model refused: {problems[0]} ({len(problems)} in all); send the weights of the same model")
        with torch.no_grad():
            for name, tensor in tensors.items():
                named[name].copy_(tensor)

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """One result per request, in order; ``seconds`` is the wall time of the whole call. Raises WriterError, BasisError for unusable requests.

        Rolled back (the request's own weights, no probe, the reason): a loss or B that is not finite at any time, or loss_after above
        ``max_loss_ratio`` x loss_before. Both are over all examples of the request; loss_after of a diverged run may be inf or nan.
        The probe is the shortest example (its answer cut where it passes 64 tokens): ``before`` under the request's weights, ``after`` under the new.
        """
        if not requests:
            return []
        started = time.perf_counter()
        for request in requests:
            self._check(request)
        reading = self._cut.read([(e, example) for e, request in enumerate(requests) for example in request.examples], self._pad)
        flat = iter(reading.rows)
        rows = [[next(flat) for _ in request.examples] for request in requests]
        start = stack([request.weights for request in requests], self._basis, torch.float32, reading.prefix.device)
        run = _train(self._cut, reading.prefix, rows, start, self._config)
        after = _score_episodes(self._cut, reading.prefix, rows, run.final)
        seconds = time.perf_counter() - started
        return [self._result(request, run, e, after[e], seconds) for e, request in enumerate(requests)]

    def _check(self, request: WriteRequest) -> None:
        window = getattr(self._model.config, "sliding_window", None) or math.inf
        longest = min(self._config.max_example_tokens, window)
        if not request.examples:
            raise WriterError(f"write of episode {request.episode_id}: no examples; an empty write is the caller's to record")
        for number, example in enumerate(request.examples):
            size = len(example.prompt_ids) + len(example.answer_ids)
            if not example.prompt_ids or not example.answer_ids:
                raise WriterError(f"write of episode {request.episode_id}: example {number} needs a prompt and an answer of one token or more")
            if size > longest:
                raise WriterError(
                    f"write of episode {request.episode_id}: example {number} has {size} tokens, at most {longest} are allowed; drop it"
                )

    def _result(self, request: WriteRequest, run: _Run, e: int, after: Sequence[Tensor], seconds: float) -> WriteResult:
        loss_before = _loss(run.before[e])
        loss_after = math.nan if run.failures[e] else _loss(after)
        b = {name: stacked[e].cpu().numpy().copy() for name, stacked in run.final.items()}
        finite = all(bool(np.isfinite(matrix).all()) for matrix in b.values())
        if reason := self._refusal(run.failures[e], loss_before, loss_after, finite):
            return WriteResult(request.weights, None, loss_before, loss_after, run.steps[e], seconds, "rolled_back", reason)
        weights = FastWeights(self._basis.id, request.weights.revision + 1, b)
        return WriteResult(weights, _probe(request, run.before[e], after), loss_before, loss_after, run.steps[e], seconds, "accepted", "")

    def _refusal(self, failure: str, loss_before: float, loss_after: float, finite: bool) -> str:
        """Why a write is rolled back, in one line, or "" when it is accepted."""
        cure = f"lower write.learning_rate={self._config.learning_rate:g}"
        if failure:
            return f"{failure}; {cure}"
        if not (finite and math.isfinite(loss_before) and math.isfinite(loss_after)):
            return f"B or the loss is not finite after the last step (loss {loss_before:.4g} -> {loss_after:.4g}); {cure}"
        if loss_after > self._config.max_loss_ratio * loss_before:
            return f"the loss rose from {loss_before:.4g} to {loss_after:.4g}, past write.max_loss_ratio={self._config.max_loss_ratio:g}; {cure}"
        return ""


def _probe(request: WriteRequest, before: Sequence[Tensor], after: Sequence[Tensor]) -> Probe:
    sizes = [len(example.prompt_ids) + len(example.answer_ids) for example in request.examples]
    shortest = sizes.index(min(sizes))
    example = request.examples[shortest]
    kept = min(len(example.answer_ids), max(1, _PROBE_TOKENS - len(example.prompt_ids)))
    tokens = example.prompt_ids + example.answer_ids[:kept]
    return Probe(tokens, tuple(before[shortest][:kept].tolist()), tuple(after[shortest][:kept].tolist()))
