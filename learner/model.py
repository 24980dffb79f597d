"""The policy as the learner sees it: a Hugging Face causal LM with log-probs only where a token was sampled.

Delta is not here: ``actors.fast_weights.delta.DeltaInjector`` adds it to the projections as constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema import LearnerConfig
from learner.head import TokenHead
from learner.lora import add_factors, plain_name
from learner.types import LearnerError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Inputs(NamedTuple):
    """What ``PolicyModel.forward`` takes, in its order."""

    token_ids: Tensor
    loss_mask: Tensor
    temperature: float | Tensor
    below: Tensor | None = None
    layers_below: int = 0


class PolicyModel(nn.Module):
    """Everything runs inside ``forward``, because ZeRO-3 gathers the weights around it.

    ``lora``: PEFT's settings where theta is a LoRA, else None.
    """

    def __init__(self, base: PreTrainedModel, lora: Any) -> None:
        super().__init__()
        self.lora = lora
        base.set_output_embeddings(TokenHead(base.get_output_embeddings()))
        self.base = base

    def forward(
        self,
        token_ids: Tensor,
        loss_mask: Tensor,
        temperature: float | Tensor,
        below: Tensor | None = None,
        layers_below: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return log-prob (with gradient) and entropy (without) of each sampled token, float32 [K].

        token_ids int64 [n, T], loss_mask bool [n, T], temperature a number or float32 [K]. K counts the mask,
        in row-major order. Rows are padded on the right and attention is causal. So no token sees padding,
        and no attention mask is needed (SDPA's fast path).
        ``below``: the states [n, T, d] behind the first ``layers_below`` layers, which are not run again.
        """
        decoder = self.base.get_decoder()
        if below is None:
            hidden: Tensor = decoder(input_ids=token_ids, use_cache=False).last_hidden_state
        else:
            with _part(decoder, slice(layers_below, None), decoder.norm):
                hidden = decoder(inputs_embeds=below, use_cache=False).last_hidden_state
        # the state at one position predicts the token at the next
        states = hidden[:, :-1][loss_mask[:, 1:]]
        targets = token_ids[:, 1:][loss_mask[:, 1:]]
        result: tuple[Tensor, Tensor] = self.base.get_output_embeddings()(states, targets, temperature)
        return result

    @torch.no_grad()
    def states_behind(self, layers: int, token_ids: Tensor) -> Tensor:
        """Return the states [n, T, d] of ``token_ids`` behind the first ``layers`` layers."""
        decoder = self.base.get_decoder()
        with _part(decoder, slice(layers), nn.Identity()):
            states: Tensor = decoder(input_ids=token_ids, use_cache=False).last_hidden_state
        return states

    def by_name(self, trainable_only: bool) -> list[tuple[str, nn.Parameter]]:
        """Return parameters under their Hugging Face names, e.g. "model.layers.0.mlp.up_proj.weight".

        A tied head is listed once, as the embedding. Factors of a LoRA stand beside what they are added to.
        """
        return [
            (plain_name(name), param)
            for name, param in self.base.named_parameters()
            if param.requires_grad or not trainable_only
        ]

    @torch.no_grad()
    def set_by_name(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the named parameters of a model that no engine has sharded."""
        parameters = dict(self.by_name(trainable_only=False))
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


@contextmanager
def _part(decoder: Any, layers: slice, norm: nn.Module) -> Iterator[None]:
    """Run only ``layers`` of the decoder, and ``norm`` behind them."""
    whole = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = decoder.layers[layers], norm
    try:
        yield
    finally:
        decoder.layers, decoder.norm = whole


def load_model(model_path: str, config: LearnerConfig, seed: int = 0) -> PolicyModel:
    """Load a Hugging Face folder in ``config.dtype``; ``config.trainable`` parameters require a gradient.

    ``seed`` draws the factors of a LoRA. Raises LearnerError.
    """
    base = _load(model_path, config)
    base.config.use_cache = False
    base.train()
    lora = add_factors(base, config, seed) if config.trainable == "lora" else None
    _freeze(base, config)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyModel(base, lora)


def load_reference(model_path: str, config: LearnerConfig) -> PolicyModel:
    """Load a frozen copy of the weights, for the KL term. Each rank holds a whole copy.

    That of a LoRA has factors too, at 0: what a warm start trains is put there.
    """
    base = _load(model_path, config)
    lora = add_factors(base, config, seed=0) if config.trainable == "lora" else None
    base.requires_grad_(False)
    return PolicyModel(base.eval(), lora)


def _load(model_path: str, config: LearnerConfig) -> PreTrainedModel:
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_path, dtype=_DTYPES[config.dtype])
    return base


def _freeze(base: PreTrainedModel, config: LearnerConfig) -> None:
    """Freeze all but the last layers, for ``config.trainable`` = "last_layers".

    Autograd keeps and computes nothing below the first trainable layer. Embeddings and head are frozen too:
    where they are tied, training the head would train the input of the frozen layers.
    """
    if config.trainable != "last_layers":
        return
    decoder = base.get_decoder()
    layers = list(decoder.layers)
    if config.trainable_layers > len(layers):
        raise LearnerError(
            f"learner.trainable_layers={config.trainable_layers} is not allowed: "
            f"the model has {len(layers)} layers; lower it"
        )
    base.requires_grad_(False)
    for layer in layers[-config.trainable_layers :]:
        layer.requires_grad_(True)
    decoder.norm.requires_grad_(True)
