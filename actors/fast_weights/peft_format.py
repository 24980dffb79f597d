"""Writes fast weights as a stock PEFT LoRA adapter, and reads them back: for export and for other engines.

scaling = lora_alpha / r is 1, so PEFT computes what ``add_delta`` computes. An adapter that PEFT would apply
in another way (use_rslora, alpha_pattern, rank_pattern, use_dora) is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import regex
import safetensors
import safetensors.torch
import torch
from pydantic import FiniteFloat, PositiveInt
from torch import Tensor

from actors.fast_weights.basis import read_safetensors
from actors.fast_weights.delta import Basis, BasisError, check
from actors.types import FastWeights
from configs.files import dump_json, new_folder, read_json

_PREFIX = "base_model.model."
_PATTERN_S = 1.0
_TENSORS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_REVISION = "engram_revision"
T = TypeVar("T", int, float)


def to_peft(weights: FastWeights, basis: Basis) -> dict[str, Tensor]:
    """The tensors of the adapter by PEFT's names, float32. Raises BasisError.

    lora_A [rank, d_in] is the revision's own A, else the basis. lora_B [d_out, rank] is zeros for revision 0.
    """
    check(weights, basis)
    tensors: dict[str, Tensor] = {}
    for name, a in basis.a.items():
        zeros = torch.zeros(basis.d_out[name], basis.rank)
        b = torch.tensor(weights.b[name]) if weights.revision > 0 else zeros
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = torch.tensor(weights.a[name]) if name in weights.a else a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    return tensors


def adapter_config(basis: Basis, base_model: str) -> dict[str, object]:
    """What PEFT's LoraConfig reads; ``target_modules`` are full names, so no other layer is touched."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": basis.rank,
        "lora_alpha": basis.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(basis.modules),
        "inference_mode": True,
    }


def export_peft(weights: FastWeights, basis: Basis, folder: str | os.PathLike[str], base_model: str) -> None:
    """Write an adapter folder that ``peft.PeftModel.from_pretrained`` loads. It appears whole, or not at all.

    Raises BasisError for foreign weights and FileExistsError for a folder that holds something.
    """
    target = Path(folder)
    tensors = to_peft(weights, basis)
    metadata = {"format": "pt", "basis_id": basis.id, _REVISION: str(weights.revision)}
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: already holds something; export into a new folder")
    with new_folder(target) as partial:
        safetensors.torch.save_file(tensors, partial / _TENSORS, metadata=metadata)
        (partial / _CONFIG).write_text(dump_json(adapter_config(basis, base_model), indent=2) + "\n")


@dataclass(frozen=True)
class _Settings:
    """What is read of the adapter's configuration. PEFT writes null for a pattern that is not set."""

    r: PositiveInt
    lora_alpha: FiniteFloat
    use_rslora: bool | None = False
    use_dora: bool | None = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    fan_in_fan_out: bool | None = False

    def rank(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(pattern: Mapping[str, T] | None, module: str, default: T) -> T:
    """PEFT's rule: the first key that matches the end of the module's name, as a regular expression.

    Raises TimeoutError: an adapter comes from outside, and such an expression may take for ever.
    """
    for key, value in (pattern or {}).items():
        if regex.match(rf"(.*\.)?({key})$", module, timeout=_PATTERN_S):
            return value
    return default


def from_peft(folder: str | os.PathLike[str], basis: Basis) -> FastWeights:
    """Read fast weights that ``export_peft`` wrote.

    Raises BasisError when the folder is damaged, belongs to another basis, or is no plain LoRA.
    """
    try:
        tensors, metadata = read_safetensors(Path(folder) / _TENSORS)
        revision = int(metadata.get(_REVISION, "1"))
        settings = read_json(Path(folder) / _CONFIG, _Settings)
        scales = {module: settings.scaling(module) for module in basis.modules}
        ranks = {module: settings.rank(module) for module in basis.modules}
    except (OSError, ValueError, ArithmeticError, regex.error, safetensors.SafetensorError) as error:
        raise BasisError(
            f"{folder}: cannot be read as an adapter ({error}); give a folder written by the export"
        ) from error
    for setting in ("use_dora", "fan_in_fan_out"):
        if getattr(settings, setting):
            raise BasisError(
                f"{folder}: has {setting}=true, and fast weights are a plain B A: train it without"
            )
    for module in basis.modules:
        rank, scale = ranks[module], scales[module]
        if rank != basis.rank or not math.isclose(scale, 1, rel_tol=1e-6):
            raise BasisError(
                f"{folder}: {module} has rank {rank} and scaling {scale:g}, "
                f"basis {basis.id} needs rank {basis.rank} and scaling 1"
            )
    return _unpack(tensors, revision, basis, folder)


def _unpack(
    tensors: Mapping[str, Tensor], revision: int, basis: Basis, folder: str | os.PathLike[str]
) -> FastWeights:
    expected = {f"{_PREFIX}{name}.lora_{side}.weight" for name in basis.modules for side in "AB"}
    if set(tensors) != expected:
        first = min(set(tensors) ^ expected)
        raise BasisError(
            f"{folder}: its matrices are not those of basis {basis.id}, first {first}; "
            "use the basis it was written with"
        )
    a = {name: tensors[f"{_PREFIX}{name}.lora_A.weight"].float() for name in basis.modules}
    moved = basis.train_a and revision > 0
    for name, own in a.items():
        if not moved and not torch.equal(own, basis.a[name]):
            raise BasisError(
                f"{folder}: A of {name} is not that of basis {basis.id}; use the basis it was written with"
            )
    if revision == 0:
        return FastWeights(basis.id, 0, {})
    b = {name: tensors[f"{_PREFIX}{name}.lora_B.weight"].float().numpy() for name in basis.modules}
    own_a = {name: own.numpy() for name, own in a.items()} if moved else {}
    weights = FastWeights(basis.id, revision, b, own_a)
    check(weights, basis)
    return weights
