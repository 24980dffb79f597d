"""Tiny random models of each supported family, and the examples and requests that are written on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors.fast_weights.basis import compute_basis, target_modules
from actors.fast_weights.delta import Basis, BasisKind, zero
from actors.types import FastWeights, WriteExample, WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, OwnedWeights
from actors.write.writer import BatchedWriter
from configs.schema import FastWeightsConfig, WriteConfig

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
VOCABULARY = 97
CPU = torch.device("cpu")


def tiny_model(family: str = "llama", head_scale: float = 5) -> nn.Module:
    """Four layers, hidden 32. ``head_scale`` widens the logits; 1 is fine where losses do not matter."""
    torch.manual_seed(0)
    model_class, config_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    model: nn.Module = model_class(config).eval()
    with torch.no_grad():  # the library's tiny initialisation would leave logits flat
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
        model.lm_head.weight.mul_(head_scale)
    return model


def basis_of(model: nn.Module, last_layers: int = 2, kind: BasisKind = "svd") -> Basis:
    """A basis of rank 3 of the model's last layers. Not of kind "data", which needs a text."""
    config = FastWeightsConfig(rank=3, last_layers=last_layers, basis=kind)
    weights = dict(model.named_parameters())
    return compute_basis(
        {name: weights[f"{name}.weight"] for name in target_modules(4, config)}, config, seed=0
    )


def examples(seed: int, count: int, shared_prefix: int = 0) -> tuple[WriteExample, ...]:
    """Ragged examples: prompts of 2..12 tokens, answers of 1..6, behind a prefix that all of them share."""
    draw = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in draw.integers(0, VOCABULARY, draw.integers(low, high + 1)))

    prefix = tuple(range(shared_prefix))
    return tuple(WriteExample(prefix + tokens(2, 12), tokens(1, 6)) for _ in range(count))


def random_weights(basis: Basis, seed: int) -> FastWeights:
    """Revision 2, as two writes could leave it."""
    draw = np.random.default_rng(seed)
    b = {
        name: draw.normal(0, 0.01, (rows, basis.rank)).astype(np.float32)
        for name, rows in basis.d_out.items()
    }
    return FastWeights(basis.id, 2, b)


def ragged_requests(basis: Basis, shared_prefix: int = 0) -> list[WriteRequest]:
    """Three episodes: from zero with three minibatches an epoch, from revision 2 and zero with one."""
    return [
        WriteRequest("a", zero(basis), examples(1, 7, shared_prefix)),
        WriteRequest("b", random_weights(basis, 5), examples(2, 2, shared_prefix)),
        WriteRequest("c", zero(basis), examples(3, 3, shared_prefix)),
    ]


def frozen(model: nn.Module, dtype: torch.dtype = torch.float32) -> FrozenLlama:
    return OwnedWeights(model.state_dict(), dtype, CPU).model(model.config)


def write(
    requests: Sequence[WriteRequest], config: WriteConfig, family: str = "llama", last_layers: int = 2
) -> list[WriteResult]:
    model = tiny_model(family)
    return BatchedWriter(frozen(model), basis_of(model, last_layers), config).write(requests)
