"""The policy as the learner sees it: a Hugging Face causal LM whose log-probs are computed only where a token was sampled.

Delta is not here: ``actors.fast_weights.delta.DeltaInjector`` adds it to the base model's projections as constants.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema import LearnerConfig
from learner.head import TokenHead
from learner.types import LearnerError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(nn.Module):
    """``forward`` gives the log-prob and entropy of each sampled token; everything runs inside it, as ZeRO-3 gathers weights around it."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        base.set_output_embeddings(TokenHead(base.get_output_embeddings()))
        self.base = base

    def forward(self, token_ids: Tensor, loss_mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """token_ids int64 [n, T], loss_mask bool [n, T] -> (log-probs with gradient, entropies without), float32 [K] in row-major order.

        Rows are padded on the right and attention is causal, so no token sees padding and no mask is needed (SDPA's fast path).
        """
        hidden: Tensor = self.base.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state
        before = hidden[:, :-1][loss_mask[:, 1:]]  # the state that predicted each sampled token
        result: tuple[Tensor, Tensor] = self.base.get_output_embeddings()(
            before, token_ids[:, 1:][loss_mask[:, 1:]], temperature
        )
        return result


def load_model(model_path: str, config: LearnerConfig) -> PolicyModel:
    """The model of a Hugging Face folder in ``config.dtype``, with ``config.trainable`` parameters requiring a gradient. Raises LearnerError."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_path, dtype=_DTYPES[config.dtype])
    base.config.use_cache = False
    base.train()
    _freeze(base, config)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyModel(base)


def load_reference(model_path: str, config: LearnerConfig) -> PolicyModel:
    """A frozen copy of the weights that the run started from, for the KL term. A whole copy on each rank, also under ZeRO-3."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_path, dtype=_DTYPES[config.dtype])
    base.requires_grad_(False)
    return PolicyModel(base.eval())


def _freeze(base: PreTrainedModel, config: LearnerConfig) -> None:
    """``last_layers``: autograd keeps and computes nothing below the first trainable layer, because nothing there asks for a gradient.

    Embeddings and head stay frozen with the trunk: where they are tied, training the head would train the input of the frozen trunk.
    """
    if config.trainable == "full":
        return
    decoder = base.get_decoder()
    layers: Iterable[nn.Module] = decoder.layers
    count = len(list(layers))
    if config.trainable_layers > count:
        raise LearnerError(
            f"learner.trainable_layers={config.trainable_layers} is not allowed: the model has {count} layers; lower it"
        )
    base.requires_grad_(False)
    for layer in list(layers)[-config.trainable_layers :]:
        layer.requires_grad_(True)
    decoder.norm.requires_grad_(True)
