"""The write operator T: flashcards of many episodes -> the next B of each, as one batched computation.

Method: TMEM, arXiv 2606.04536: a few SFT steps on B alone, A and theta frozen, each write starting from the episode's current B. The loss is the mean
over the answer tokens of a minibatch; the optimizer's state starts fresh at every write (both unpublished: our choices).

What makes it cheap, without changing the result (each episode gets what a PEFT + torch.optim loop of its own would give):

    trunk      decoder layers below the first adapted MLP do not depend on B: run once per write, their hidden states serve all epochs
    episodes   one pass over all episodes' examples, each row under its own episode's B (batched matmul); losses are summed, so gradients stay apart
    answers    the last MLP, the final norm and the head run at answer positions only
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from actors.fast_weights import Basis, DeltaInjector, stack
from actors.protocols import WriterError
from actors.types import FastWeights, Probe, WriteExample, WriteRequest, WriteResult
from configs.schema import WriteConfig

SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose decoder layer is h += attention(norm(h)); h += mlp(norm(h)): the cut below relies on it."""

_PROBE_TOKENS = 64


@dataclass(frozen=True, eq=False)
class _Row:
    """One example after the trunk. hidden [T, d]: the stream that enters the first adapted MLP. targets int64 [A]: the answer tokens.

    Position ``first + k`` of ``hidden`` predicts ``targets[k]``. T = first + A: the last answer token is never an input.
    """

    episode: int
    hidden: Tensor
    first: int
    targets: Tensor


class _CutModel:
    """A causal LM cut where Delta begins to act: in front of the first adapted MLP."""

    def __init__(self, model: Any, basis: Basis, chunk_tokens: int) -> None:
        self._model = model
        self._cut = basis.first_layer
        self._chunk_tokens = chunk_tokens
        self._injector = DeltaInjector(model, basis)

    @torch.no_grad()
    def read(self, examples: Sequence[tuple[int, WriteExample]], pad: int) -> list[_Row]:
        """Run the trunk: (episode, example) -> row."""
        device = self._model.model.embed_tokens.weight.device
        inputs = [torch.tensor(example.prompt_ids + example.answer_ids[:-1]) for _, example in examples]
        rows: dict[int, _Row] = {}
        for chunk in self._chunks([len(ids) for ids in inputs]):
            hidden = self._trunk(pad_sequence([inputs[i] for i in chunk], batch_first=True, padding_value=pad).to(device))
            for place, i in enumerate(chunk):
                episode, example = examples[i]
                targets = torch.tensor(example.answer_ids, device=device)
                rows[i] = _Row(episode, hidden[place, : len(inputs[i])].clone(), len(example.prompt_ids) - 1, targets)
        return [rows[i] for i in range(len(examples))]

    def score(self, rows: Sequence[_Row], b: Mapping[str, Tensor], loss_weights: Sequence[float] | None) -> list[Tensor]:
        """Log-probs [A] float32 of each row's answer under its episode's B; b: name -> [episodes, d_out, rank].

        With ``loss_weights``, one a row, adds the gradient of -sum(weight * log-prob) to ``b``.
        """
        out: dict[int, Tensor] = {}
        for chunk in self._chunks([len(row.hidden) for row in rows]):
            picked = [rows[i] for i in chunk]
            sizes = [len(row.targets) for row in picked]
            device = picked[0].hidden.device
            episodes = torch.tensor([row.episode for row in picked], device=device)
            with torch.set_grad_enabled(loss_weights is not None), self._injector.use({name: m.index_select(0, episodes) for name, m in b.items()}):
                logprobs = self._answer_logprobs(picked)
                if loss_weights is not None:
                    weights = torch.tensor([loss_weights[i] for i in chunk], device=device).repeat_interleave(torch.tensor(sizes, device=device))
                    torch.autograd.backward(-(logprobs * weights).sum())
            out.update(zip(chunk, torch.split(logprobs.detach(), sizes), strict=True))
        return [out[i] for i in range(len(rows))]

    def _chunks(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of near-equal lengths, each chunk at most ``chunk_tokens`` padded tokens (a longer row is its own chunk)."""
        chunk: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if chunk and (len(chunk) + 1) * lengths[i] > self._chunk_tokens:
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _context(self, hidden: Tensor) -> dict[str, Any]:
        """What a decoder layer needs besides the stream. Rows are padded on the right, so the causal mask alone keeps padding from real tokens."""
        from transformers.masking_utils import create_causal_mask

        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(self._model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions)
        return {"attention_mask": mask, "position_ids": positions, "position_embeddings": self._model.model.rotary_emb(hidden, positions)}

    def _trunk(self, ids: Tensor) -> Tensor:
        core = self._model.model
        hidden = core.embed_tokens(ids)
        context = self._context(hidden)
        for layer in core.layers[: self._cut]:
            hidden = layer(hidden, **context)
        return self._attend(core.layers[self._cut], hidden, context)

    @staticmethod
    def _attend(layer: Any, hidden: Tensor, context: Mapping[str, Any]) -> Tensor:
        attended: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **context)[0]
        return hidden + attended

    def _answer_logprobs(self, rows: Sequence[_Row]) -> Tensor:
        """Concatenated log-probs of the rows' answers, float32 [sum of A], under the B in use."""
        core = self._model.model
        hidden = pad_sequence([row.hidden for row in rows], batch_first=True)
        context = self._context(hidden)
        # Answer positions, padded with position 0 to a rectangle [rows, longest A]: the per-row Delta needs one.
        positions = pad_sequence([row.first + torch.arange(len(row.targets), device=hidden.device) for row in rows], batch_first=True)
        real = pad_sequence([torch.ones_like(row.targets, dtype=torch.bool) for row in rows], batch_first=True)
        layers = core.layers[self._cut :]
        for number, layer in enumerate(layers):
            if number > 0:
                hidden = self._attend(layer, hidden, context)
            if number == len(layers) - 1:
                hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = self._model.lm_head(core.norm(hidden)[real]).float()
        return -functional.cross_entropy(logits, torch.cat([row.targets for row in rows]), reduction="none")


@dataclass(frozen=True, eq=False)
class _Run:
    """What the steps did, by episode. before: log-probs of each example under the request's weights. final: name -> [episodes, d_out, rank].

    failures: "" or why the run of that episode was stopped; its ``final`` is then what it started from.
    """

    before: list[list[Tensor]]
    final: dict[str, Tensor]
    steps: list[int]
    failures: list[str]


def _train(model: _CutModel, rows: Sequence[Sequence[_Row]], start: Mapping[str, Tensor], config: WriteConfig) -> _Run:
    """All episodes step together; one that has had its epochs, or diverged, is left out of the next steps."""
    leaves = {name: b.clone().requires_grad_() for name, b in start.items()}
    final = {name: b.clone() for name, b in start.items()}
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam  # elementwise both: stacked episodes stay apart
    optimizer = kind(list(leaves.values()), lr=config.learning_rate)
    batches = [[mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)] for mine in rows]
    totals = [config.epochs * len(mine) for mine in batches]
    steps, failures = [0] * len(rows), [""] * len(rows)
    several = [e for e in range(len(rows)) if len(batches[e]) > 1]
    before = dict(zip(several, _score_episodes(model, [rows[e] for e in several], start), strict=True))
    for step in range(max(totals)):
        active = [e for e in range(len(rows)) if step < totals[e] and not failures[e]]
        current = [batches[e][step % len(batches[e])] for e in active]
        optimizer.zero_grad()
        scores = _score_episodes(model, current, leaves, learn=True)
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


def _score_episodes(model: _CutModel, rows: Sequence[Sequence[_Row]], b: Mapping[str, Tensor], learn: bool = False) -> list[list[Tensor]]:
    """Log-probs by episode and example. With ``learn``, adds to ``b`` the gradient of each episode's mean loss over its answer tokens."""
    weights = [1 / sum(len(row.targets) for row in mine) for mine in rows for _ in mine]
    flat = iter(model.score([row for mine in rows for row in mine], b, weights if learn else None))
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
        """``model``: a *ForCausalLM of SUPPORTED_MODELS, which this object now owns: put in eval mode, frozen, hooked. Raises WriterError, BasisError.

        ``pad_token_id`` fills the right of shorter rows, where no real token looks.
        """
        if model.config.model_type not in SUPPORTED_MODELS:
            raise WriterError(f"model type {model.config.model_type!r} is not supported by the writer: use one of {', '.join(SUPPORTED_MODELS)}")
        self._model = model.eval().requires_grad_(False)
        self._basis = basis
        self._config = config
        self._pad = pad_token_id
        self._cut = _CutModel(model, basis, config.chunk_tokens)

    @classmethod
    def from_checkpoint(cls, model_path: str, basis: Basis, config: WriteConfig, dtype: Literal["float32", "bfloat16"]) -> Self:
        """A writer with its own copy of the model, on the CPU."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
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
        flat = iter(self._cut.read([(e, example) for e, request in enumerate(requests) for example in request.examples], self._pad))
        rows = [[next(flat) for _ in request.examples] for request in requests]
        start = stack([request.weights for request in requests], self._basis, torch.float32, rows[0][0].hidden.device)
        run = _train(self._cut, rows, start, self._config)
        after = _score_episodes(self._cut, rows, run.final)
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
