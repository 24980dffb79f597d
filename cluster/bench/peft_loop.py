"""A write without Engram, the writer's baseline: stock PEFT and torch.optim, one episode after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from actors.fast_weights.delta import Basis
from actors.types import WriteExample, WriteRequest
from actors.write.steps import minibatches, preserved_in_turn
from configs.schema import WriteConfig

WrittenB = Mapping[str, NDArray[np.float32]]

_IGNORED = -100  # transformers leaves such labels out of the loss


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
