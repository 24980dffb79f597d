"""What the stages of ``smoke`` share: the model, its basis, an engine, and random flashcards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Report = dict[str, Any]


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def dtype() -> Literal["float32", "bfloat16"]:
    return "bfloat16" if on_gpu() else "float32"


def make_model(folder: Path) -> None:
    """Write a random Qwen3: of Qwen3-0.6B's shape in bfloat16 on a GPU, tiny in float32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    real = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151_936}
    real |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    tiny = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 2048}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = Qwen3Config(
        **(real if on_gpu() else tiny), max_position_embeddings=8192, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # wide, so that a wrong adapter shows in the log-probs
                parameter.normal_(std=0.2 if "embed" in name else 0.1 * (128 / parameter.shape[-1]) ** 0.5)
    model.save_pretrained(folder)


def make_basis(folder: Path) -> Any:
    from actors.fast_weights.basis import compute_basis_from_checkpoint
    from configs.schema import FastWeightsConfig

    return compute_basis_from_checkpoint(folder, FastWeightsConfig(last_layers=2), seed=0)


def make_policy(folder: Path, basis: Any, slots: int, eager: bool) -> Any:
    from actors.engine.policy import VLLMPolicy
    from configs.schema import EngineConfig, ModelConfig

    size = 4.0 if on_gpu() else 0.125
    engine = EngineConfig(slots=slots, max_model_tokens=512, kv_cache_gib=size, enforce_eager=eager)
    threads = 4 if on_gpu() else 1
    return VLLMPolicy(folder, ModelConfig(dtype=dtype()), engine, basis, (2,), 0, threads, seed=0)


def random_cards(basis: Any, episodes: int) -> Any:
    """A write of four random flashcards for each episode, each from B = 0."""
    import numpy as np

    from actors.fast_weights.delta import zero
    from actors.types import WriteExample, WriteRequest

    draw = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(100, 1900, length).tolist())

    return [
        WriteRequest(f"e{number}", zero(basis), tuple(WriteExample(ids(30), ids(6)) for _ in range(4)))
        for number in range(episodes)
    ]


def write_config() -> Any:
    """A write that certainly moves the model."""
    from configs.schema import WriteConfig

    return WriteConfig(optimizer="adam", learning_rate=1e-3, epochs=10)
