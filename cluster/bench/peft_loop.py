"""The write as one would write it without Engram: stock PEFT, torch.optim, one episode after the other, its flashcards as one padded batch."""

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
from configs.schema import WriteConfig

_IGNORED = -100  # transformers leaves such labels out of the loss


class PeftLoop:
    """Full forward with all logits, loss on the answers, backward, step; A frozen at the basis."""

    def __init__(
        self, model_path: Path, basis: Basis, config: WriteConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa").to(
            device
        )
        lora = LoraConfig(
            r=basis.rank,
            lora_alpha=basis.rank,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(basis.modules),
        )
        self._model: Any = get_peft_model(base, lora).eval()
        self._config, self._device = config, device
        self._b: dict[str, torch.nn.Parameter] = {}
        wide = torch.promote_types(dtype, torch.float32)  # adapters of a bfloat16 model are float32
        for name in basis.modules:
            layer = self._model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data = basis.a[name].to(device, wide)
            layer.lora_A["default"].weight.requires_grad_(False)
            self._b[name] = layer.lora_B["default"].weight
            self._b[name].data = self._b[name].data.to(wide)

    def write(self, requests: Sequence[WriteRequest]) -> list[Mapping[str, NDArray[np.float32]]]:
        """The B of each request, which must start from zero."""
        return [self._write(request) for request in requests]

    def _write(self, request: WriteRequest) -> Mapping[str, NDArray[np.float32]]:
        config = self._config
        for parameter in self._b.values():
            parameter.data.zero_()
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
        optimizer = kind(list(self._b.values()), lr=config.learning_rate)
        examples = request.examples
        batches = [
            self._batch(examples[i : i + config.batch_size])
            for i in range(0, len(examples), config.batch_size)
        ]
        for _ in range(config.epochs):
            for batch in batches:
                optimizer.zero_grad()
                self._loss(batch).backward()
                optimizer.step()
        return {name: parameter.detach().float().cpu().numpy().copy() for name, parameter in self._b.items()}

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As transformers' own loss, except that a float64 model's logits stay float64."""
        logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(
            wide.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=_IGNORED
        )

    def _batch(self, examples: Sequence[WriteExample]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(example.prompt_ids + example.answer_ids) for example in examples]
        labels = [
            torch.tensor([_IGNORED] * len(example.prompt_ids) + list(example.answer_ids))
            for example in examples
        ]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
        }
        return {name: tensor.to(self._device) for name, tensor in batch.items()}
