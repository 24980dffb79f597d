"""The steps of a write, as optimizers over the stacked B of many episodes: [n, d_out, r] a matrix, each episode with its own gradient.

SGD (the paper's) and Adam are torch's. NaturalOptimizer is Engram's own: the direction G^-1 grad C^-1 (sensitivity.py) in all matrices at once, as long as the
second-order model predicts a harm of ``kl`` nats per token for it, and no longer than a loss of 0 needs (Polyak's step: what is known is not learnt
harder), whichever is the shorter:

    d = G^-1 g C^-1,    slope = sum over matrices of <g, d>,    dB = -min(sqrt(2 kl / slope), loss / slope) d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from actors.fast_weights.delta import StackedWeights
from actors.fast_weights.sensitivity import Sensitivity
from configs.schema import WriteConfig


class WriteOptimizer(Protocol):
    """An optimizer that may look at what it minimises."""

    def zero_grad(self) -> None: ...

    def step(self, losses: Tensor) -> None:
        """losses: float32 [n], each episode's before the step, 0 for those that take none."""


class _TorchOptimizer:
    """One of torch's, which does not look."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self, losses: Tensor) -> None:
        self._optimizer.step()


def make_optimizer(
    weights: StackedWeights, guard: Sequence[Sensitivity], config: WriteConfig
) -> WriteOptimizer:
    """The optimizer that moves ``weights`` in place; guard: of each matrix, for the natural one. None mixes episodes: companions stay apart."""
    leaves = [leaf.requires_grad_() for leaf in (*weights.b.values(), *weights.a.values())]
    if config.optimizer == "sgd":
        return _TorchOptimizer(torch.optim.SGD(leaves, lr=config.learning_rate))
    if config.optimizer == "adam":
        return _TorchOptimizer(torch.optim.Adam(leaves, lr=config.learning_rate))
    return NaturalOptimizer(leaves, guard, config.step_kl)


class NaturalOptimizer:
    """See the module's text. sensitivities: of each parameter. No gradient, no movement."""

    def __init__(self, parameters: Sequence[Tensor], sensitivities: Sequence[Sensitivity], kl: float) -> None:
        self._parameters, self._sensitivities, self._kl = parameters, sensitivities, kl

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, losses: Tensor) -> None:
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._parameters]
        directions = [
            one.natural(gradient) for gradient, one in zip(gradients, self._sensitivities, strict=True)
        ]
        slope = torch.stack(
            [(g * d).flatten(1).sum(1) for g, d in zip(gradients, directions, strict=True)]
        ).sum(0)
        steep = slope.clamp_min(torch.finfo(slope.dtype).tiny)
        length = torch.where(slope > 0, torch.minimum((2 * self._kl / steep).sqrt(), losses / steep), 0.0)
        for parameter, direction in zip(self._parameters, directions, strict=True):
            parameter.sub_(direction * length[:, None, None])
