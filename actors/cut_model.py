"""A causal LM cut where Delta begins to act, for a writer that runs the same few examples through it many times.

    tokens --> [decoder layers below the cut, and the cut layer's attention] --> Row --> [MLP, layers above, norm, head] --> log-probs of the answer
               the trunk: does not depend on B, runs once per write                      runs once per optimizer step

Two more savings that leave every number as it is (up to rounding): tokens that all examples begin with (chat template, system prompt) run once, not
once per example, in the trunk once in all and above the cut once per episode, whose rows then attend to its keys and values; and the last MLP, the
norm and the head run at answer positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from actors.fast_weights import Basis, DeltaInjector
from actors.types import WriteExample


@dataclass(frozen=True, eq=False)
class Row:
    """One example after the trunk, without the shared prefix. hidden [S, d]: the stream that enters the first adapted MLP.

    targets int64 [A]: the answer. Position ``first + k`` of ``hidden`` predicts ``targets[k]``; S = first + A, the last answer token is no input.
    """

    episode: int
    hidden: Tensor
    first: int
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """All examples of a write after the trunk. prefix [1, P, d]: the same stream for the P >= 0 tokens that every example begins with."""

    prefix: Tensor
    rows: tuple[Row, ...]


class _KeysAndValues:
    """Stands where attention expects a KV cache. Without ``of_row`` it records; with it, row i attends to entry ``of_row[i]``, then to itself."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.of_row: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if self.of_row is None:
            self._kept[layer_idx] = (keys, values)
            return keys, values
        if layer_idx not in self._kept:  # no prefix
            return keys, values
        before = [kept.index_select(0, self.of_row) for kept in self._kept[layer_idx]]
        return torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)


class CutModel:
    """See the module's text. ``model``: a frozen Llama-like *ForCausalLM with sdpa or eager attention; its hooks are this object's."""

    def __init__(self, model: Any, basis: Basis, chunk_tokens: int) -> None:
        self._model = model
        self._cut = basis.first_layer
        self._chunk_tokens = chunk_tokens
        self._injector = DeltaInjector(model, basis)

    @torch.no_grad()
    def read(self, examples: Sequence[tuple[int, WriteExample]], pad: int) -> Reading:
        """Run the trunk over (episode, example) pairs, at least one; rows come back in their order. ``pad`` fills shorter rows on the right."""
        device = self._model.model.embed_tokens.weight.device
        shared = self._shared_prefix([example.prompt_ids for _, example in examples])
        inputs = [torch.tensor(example.prompt_ids[len(shared) :] + example.answer_ids[:-1]) for _, example in examples]
        past = _KeysAndValues()
        shared_ids = torch.tensor([shared], dtype=torch.long, device=device)
        prefix = self._trunk(shared_ids, 0, past) if shared else self._model.model.embed_tokens(shared_ids)
        rows: dict[int, Row] = {}
        for chunk in self._chunks([len(ids) for ids in inputs], len(shared)):
            past.of_row = torch.zeros(len(chunk), dtype=torch.long, device=device)
            hidden = self._trunk(pad_sequence([inputs[i] for i in chunk], batch_first=True, padding_value=pad).to(device), len(shared), past)
            for place, i in enumerate(chunk):
                episode, example = examples[i]
                targets = torch.tensor(example.answer_ids, device=device)
                rows[i] = Row(episode, hidden[place, : len(inputs[i])].clone(), len(example.prompt_ids) - len(shared) - 1, targets)
        return Reading(prefix, tuple(rows[i] for i in range(len(examples))))

    def score(self, prefix: Tensor, rows: Sequence[Row], b: Mapping[str, Tensor], loss_weights: Sequence[float] | None) -> list[Tensor]:
        """Log-probs [A] float32 of each row's answer under its episode's B; b: name -> [episodes, d_out, rank].

        With ``loss_weights``, one a row, adds the gradient of -sum(weight * log-prob) to ``b``.
        """
        out: dict[int, Tensor] = {}
        for chunk in self._chunks([len(row.hidden) for row in rows], prefix.shape[1]):
            picked = [rows[i] for i in chunk]
            sizes = [len(row.targets) for row in picked]
            with torch.set_grad_enabled(loss_weights is not None):
                logprobs = self._answer_logprobs(prefix, picked, b)
                if loss_weights is not None:
                    weights = [loss_weights[i] for i, size in zip(chunk, sizes, strict=True) for _ in range(size)]
                    torch.autograd.backward(-(logprobs * torch.tensor(weights, device=logprobs.device)).sum())
            out.update(zip(chunk, torch.split(logprobs.detach(), sizes), strict=True))
        return [out[i] for i in range(len(rows))]

    @staticmethod
    def _shared_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """What all prompts begin with, short of any prompt's last token: that one predicts an answer and belongs to its row."""
        equal = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
        return prompts[0][: min(equal, *(len(prompt) - 1 for prompt in prompts))]

    def _chunks(self, lengths: Sequence[int], prefix: int) -> Iterator[list[int]]:
        """Indices of near-equal lengths, each chunk at most ``chunk_tokens`` padded tokens (a longer row is its own chunk)."""
        chunk: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            cost = lengths[i] + prefix // 8  # of the prefix a row holds only keys and values
            if chunk and (len(chunk) + 1) * cost > self._chunk_tokens:
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _context(self, hidden: Tensor, start: int, past: _KeysAndValues) -> dict[str, Any]:
        """What a decoder layer needs besides the stream, at positions ``start``... Rows are padded on the right, so causality alone hides padding."""
        length = hidden.shape[1]
        positions = torch.arange(start, start + length, device=hidden.device)[None]
        mask = torch.full((1, 1, length, start + length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device).triu(start + 1)
        embeddings = self._model.model.rotary_emb(hidden, positions)
        return {"attention_mask": mask, "position_ids": positions, "position_embeddings": embeddings, "past_key_values": past}

    def _trunk(self, ids: Tensor, start: int, past: _KeysAndValues) -> Tensor:
        core = self._model.model
        hidden: Tensor = core.embed_tokens(ids)
        context = self._context(hidden, start, past)
        for layer in core.layers[: self._cut]:
            hidden = layer(hidden, **context)
        return self._attend(core.layers[self._cut], hidden, context)

    @staticmethod
    def _attend(layer: Any, hidden: Tensor, context: Mapping[str, Any]) -> Tensor:
        attended: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **context)[0]
        return hidden + attended

    @staticmethod
    def _feed(layer: Any, hidden: Tensor) -> Tensor:
        fed: Tensor = layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden + fed

    def _answer_logprobs(self, prefix: Tensor, rows: Sequence[Row], b: Mapping[str, Tensor]) -> Tensor:
        """Concatenated log-probs of the rows' answers, float32 [sum of A]."""
        episodes, of_row = torch.unique(torch.tensor([row.episode for row in rows], device=prefix.device), return_inverse=True)
        mine = {name: matrix.index_select(0, episodes) for name, matrix in b.items()}
        past = _KeysAndValues()
        if prefix.shape[1] > 0:
            with self._injector.use(mine):
                self._fill_prefix(prefix.expand(len(episodes), -1, -1), past)
        past.of_row = of_row
        with self._injector.use({name: matrix.index_select(0, of_row) for name, matrix in mine.items()}):
            hidden = self._answer_stream(rows, prefix.shape[1], past)
        return -functional.cross_entropy(self._model.lm_head(hidden).float(), torch.cat([row.targets for row in rows]), reduction="none")

    def _fill_prefix(self, hidden: Tensor, past: _KeysAndValues) -> None:
        """Run the prefix of each episode [episodes, P, d] above the cut, as far as its keys and values."""
        layers = self._model.model.layers[self._cut :]
        context = self._context(hidden, 0, past)
        for lower, layer in pairwise(layers):
            hidden = self._attend(layer, self._feed(lower, hidden), context)

    def _answer_stream(self, rows: Sequence[Row], start: int, past: _KeysAndValues) -> Tensor:
        """The normed stream at the answer-predicting positions of all rows [sum of A, d]."""
        core = self._model.model
        hidden = pad_sequence([row.hidden for row in rows], batch_first=True)
        context = self._context(hidden, start, past)
        layers = core.layers[self._cut :]
        for lower, layer in pairwise(layers):
            hidden = self._attend(layer, self._feed(lower, hidden), context)
        # Padded with position 0 to a rectangle [rows, longest A]: the per-row Delta of the last MLP needs one.
        positions = pad_sequence([row.first + torch.arange(len(row.targets), device=hidden.device) for row in rows], batch_first=True)
        real = pad_sequence([torch.ones_like(row.targets, dtype=torch.bool) for row in rows], batch_first=True)
        hidden = self._feed(layers[-1], hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])))
        normed: Tensor = core.norm(hidden)
        return normed[real]
