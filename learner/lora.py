"""The policy as a LoRA: trained factors beside frozen base weights (Hu et al. 2021, arXiv 2106.09685).

PEFT puts the factors into the model. They go by the module's Hugging Face name, with PEFT's endings:
"model.layers.0.self_attn.q_proj.lora_A.weight". Dropout is 0: else the learner's log-probs would not be those
of the policy that sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.policy_lora import WEIGHT, A, B, form
from configs.schema import LearnerConfig

if TYPE_CHECKING:
    from learner.engine import TrainingEngine
    from learner.model import PolicyModel

_PEFT_PREFIX = "base_model.model."


def add_factors(base: PreTrainedModel, config: LearnerConfig, seed: int) -> Any:
    """Put factors beside the matrices of ``config.lora_targets``, and freeze all else.

    Returns PEFT's settings. A is drawn from ``seed``, the same on every rank; B is 0. So the policy begins as
    the base model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(config.lora_targets),
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, base)
    return settings


def plain_name(name: str) -> str:
    """The name of a parameter without the words that PEFT's modules add."""
    return name.replace(".base_layer", "").replace(".default", "")


def whole_policy(
    engine: TrainingEngine,
    model: PolicyModel,
    copy: bool,
    factors: Mapping[str, Tensor] | None = None,
    wanted: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights of the policy that acts, by Hugging Face name, on the CPU. Collective under ZeRO-3.

    Where the policy is a LoRA these are the sums, formed one at a time; with ``factors``, of these instead of
    the model's own. See ``TrainingEngine.full_tensors`` for ``copy`` and ``wanted``.
    """
    named = model.by_name(trainable_only=False)
    if model.lora is None:
        yield from engine.full_tensors(named, copy, wanted)
        return
    if factors is None:
        own = [one for one in named if one[0].endswith((A, B))]
        factors = dict(engine.full_tensors(own, copy=False, wanted=wanted))
    scale = model.lora.lora_alpha / model.lora.r
    base = [one for one in named if not one[0].endswith((A, B))]
    for name, weight in engine.full_tensors(base, copy, wanted):
        module = name.removesuffix(WEIGHT)
        if module + A in factors:
            yield name, form(weight, factors[module + A], factors[module + B], scale)
        else:
            yield name, weight


def save_adapter(folder: Path, settings: Any, factors: Mapping[str, Tensor], model_path: str) -> None:
    """Write the factors as a PEFT adapter of the model in ``model_path``."""
    settings.base_model_name_or_path = model_path
    settings.inference_mode = True
    settings.save_pretrained(folder)
    tensors = {_PEFT_PREFIX + name: tensor for name, tensor in factors.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
