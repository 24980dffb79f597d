"""The policy as the learner sees it: a Hugging Face causal LM whose log-probs are computed only where a token was sampled.

Delta is not here: ``actors.fast_weights.DeltaInjector`` adds it to the base model's projections as constants.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema import LearnerConfig
from learner.types import LearnerError

_HEAD_TOKENS = 512  # logits of one chunk: 100 MB at a vocabulary of 49k, 310 MB at 152k (float32), whatever the microbatch
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(nn.Module):
    """``forward`` gives the log-prob and entropy of each sampled token; everything runs inside it, as ZeRO-3 gathers weights around it."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base

    def forward(self, token_ids: Tensor, loss_mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """token_ids int64 [n, T], loss_mask bool [n, T] -> (log-probs with gradient, entropies without), float32 [K] in row-major order.

        Rows are padded on the right and attention is causal, so no token sees padding and no mask is needed (SDPA's fast path).
        """
        hidden: Tensor = self.base.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state
        before = hidden[:, :-1][loss_mask[:, 1:]]  # the state that predicted each sampled token
        targets = token_ids[:, 1:][loss_mask[:, 1:]]
        chunks = list(zip(before.split(_HEAD_TOKENS), targets.split(_HEAD_TOKENS), strict=True))
        if len(chunks) == 1:
            return self._head(before, targets, temperature)
        # More than one chunk: keep none of the logits, compute them again in the backward.
        parts = [checkpoint(self._head, states, ids, temperature, use_reentrant=False) for states, ids in chunks]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _head(self, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.base.get_output_embeddings()(states).float()
        if temperature != 1:
            logits = logits / temperature
        normalizer = logits.logsumexp(dim=-1)
        logp = logits.gather(-1, targets[:, None]).squeeze(-1) - normalizer
        with torch.no_grad():
            entropy = normalizer - ((logits - normalizer[:, None]).exp_().mul_(logits)).sum(dim=-1)
        return logp, entropy


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
        raise LearnerError(f"learner.trainable_layers={config.trainable_layers} is not allowed: the model has {count} layers; lower it")
    base.requires_grad_(False)
    for layer in list(layers)[-config.trainable_layers :]:
        layer.requires_grad_(True)
    decoder.norm.requires_grad_(True)
