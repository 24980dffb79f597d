"""The policy as base weights and the factors of a LoRA (Hu et al. 2021, arXiv 2106.09685).

    learner --(A, B of each matrix: small)--> worker: W0 + scale * B A, from the base weights on its disk
                                                                |
                                                     the engine's own matrices

With learner.trainable=lora only the factors are trained, sent and kept by the optimizer. The policy that acts
is the sum. So it is no adapter in the engine: the adapter slots hold the episodes' fast weights alone.
Learner and workers form the sum by the same function from the same values: the results are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actors.protocols import EngineError

A, B, WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"
"""Endings of the tensors of one matrix, behind the module's Hugging Face name. PEFT's files have the same."""

_PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # an engine takes each as one matrix


def form(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W0 + scale * B A in the dtype of ``base``. The sum is made in float32 and rounded once.

    base [d_out, d_in], a [r, d_in], b [d_out, r].
    """
    return torch.addmm(base.float(), b.float(), a.float(), alpha=scale).to(base.dtype)


@dataclass(frozen=True, slots=True)
class LoraBase:
    """What the factors are added to.

    folder: the base model's, readable on every worker's node. dtype: the learner's, in which it reads W0.
    scale: alpha / rank.
    """

    folder: str
    dtype: Literal["float32", "bfloat16"]
    scale: float

    def with_factors(self, factors: Mapping[str, Tensor]) -> FormedWeights:
        """The matrices that the factors change. Raises EngineError where the base does not fit them."""
        return FormedWeights(self, factors)


class FormedWeights(Mapping[str, Tensor]):
    """Matrices by Hugging Face name, each formed when it is asked for: never two of them at a time.

    W0 is a memory map of the base folder's files. So the workers of a node share its pages, and none holds a
    copy. A matrix without factors that an engine packs with one that has some is W0 itself.
    """

    def __init__(self, base: LoraBase, factors: Mapping[str, Tensor]) -> None:
        self._base, self._factors = base, factors
        changed = [name.removesuffix(A) for name in factors if name.endswith(A)]
        self._names = tuple(dict.fromkeys(one + WEIGHT for name in changed for one in _packed_with(name)))
        self._files = _open(base.folder)
        self.shapes: dict[str, tuple[int, ...]] = {name: self._shape(name) for name in self._names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        weight: Tensor = self._files[name].get_tensor(name).to(getattr(torch, self._base.dtype))
        module = name.removesuffix(WEIGHT)
        if module + A not in self._factors:
            return weight
        return form(weight, self._factors[module + A], self._factors[module + B], self._base.scale)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of W0. Checked now, because an error in the middle of a load would cost the engine."""
        if name not in self._files:
            raise EngineError(
                f"{self._base.folder}: has no {name}, which the learner trains; it is another model's"
            )
        has = tuple(self._files[name].get_slice(name).get_shape())
        module = name.removesuffix(WEIGHT)
        if module + A in self._factors:
            needs = (len(self._factors[module + B]), self._factors[module + A].shape[1])
            if has != needs:
                raise EngineError(
                    f"{self._base.folder}: {name} has shape {list(has)}, its factors are for {list(needs)}; "
                    "it is another model's"
                )
        return has


def _packed_with(module: str) -> tuple[str, ...]:
    """``module`` and those that an engine packs into one matrix with it."""
    parent, _, last = module.rpartition(".")
    together = next((names for names in _PACKED if last in names), (last,))
    return tuple(f"{parent}.{name}" for name in together)


def _open(folder: str) -> dict[str, Any]:
    """The open file of each tensor in ``folder``, by the tensor's name."""
    from safetensors import SafetensorError, safe_open

    files: dict[str, Any] = {}
    with ExitStack() as undo:
        try:
            for path in sorted(Path(folder).glob("*.safetensors")):
                reader = undo.enter_context(safe_open(path, framework="pt"))
                files.update(dict.fromkeys(reader.keys(), reader))
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"{folder}: the base weights cannot be read ({error}); every worker's node needs them"
            ) from error
        undo.pop_all()  # they stay open as long as this mapping
    return files
