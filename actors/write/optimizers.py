"""The optimizers of a write. They step the stacked B of many episodes, each episode with its own gradient.

SGD (the paper's) and Adam are torch's. The natural optimizer is Engram's own. It goes along the natural
gradient d (sensitivity.py) in all matrices at once. A step is as long as the shorter of two lengths:

    trust region   the second-order model predicts a harm of ``kl`` nats per token
    Polyak's step  the loss reaches 0 by its linear prediction: what is known is not learnt harder

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
    """An optimizer that is shown the losses which its step will lower."""

    def zero_grad(self) -> None: ...

    def step(self, losses: Tensor) -> None:
        """losses: float32 [n], each episode's before the step, 0 for an episode that takes no step."""


class _TorchOptimizer:
    """A torch optimizer. It ignores the losses."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self, losses: Tensor) -> None:
        self._optimizer.step()


class _Confined:
    """Lets an optimizer move each parameter [n, d_out, r] in the subspace of its projection [r, r] alone.

    The step is projected, not the gradient: Adam's step leaves the subspace of its gradients.
    """

    def __init__(
        self, optimizer: WriteOptimizer, parameters: Sequence[Tensor], allowed: Sequence[Tensor]
    ) -> None:
        self._optimizer, self._pairs = optimizer, list(zip(parameters, allowed, strict=True))

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    @torch.no_grad()
    def step(self, losses: Tensor) -> None:
        before = [parameter.clone() for parameter, _ in self._pairs]
        self._optimizer.step(losses)
        for (parameter, projection), start in zip(self._pairs, before, strict=True):
            parameter.copy_(start + (parameter - start) @ projection)


def make_optimizer(
    weights: StackedWeights, sensitivities: Sequence[Sensitivity], config: WriteConfig
) -> WriteOptimizer:
    """The optimizer that moves ``weights`` in place. None of them mixes episodes: companions stay apart.

    sensitivities: of each matrix, for the natural optimizer and write.null_space.
    """
    parameters = [matrix.requires_grad_() for matrix in weights.matrices]
    if config.optimizer == "natural":
        return NaturalOptimizer(parameters, sensitivities, config.step_kl)
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
    optimizer = _TorchOptimizer(kind(parameters, lr=config.learning_rate))
    if not config.null_space:
        return optimizer
    allowed = [sensitivity.null_space(config.null_space) for sensitivity in sensitivities]
    return _Confined(optimizer, parameters, allowed)


class NaturalOptimizer:
    """Steps along the natural gradient; see the module's text. Without a gradient nothing moves.

    parameters: [n, d_out, r] of each matrix, n episodes. sensitivities: of each matrix. kl: nats per token.
    """

    def __init__(self, parameters: Sequence[Tensor], sensitivities: Sequence[Sensitivity], kl: float) -> None:
        self._parameters, self._sensitivities, self._kl = parameters, sensitivities, kl

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, losses: Tensor) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        directions = [
            sensitivity.natural(gradient)
            for gradient, sensitivity in zip(gradients, self._sensitivities, strict=True)
        ]
        slope = torch.stack(
            [(g * d).flatten(1).sum(1) for g, d in zip(gradients, directions, strict=True)]
        ).sum(0)
        steep = slope.clamp_min(
            torch.finfo(slope.dtype).tiny
        )  # an episode without a gradient divides by no 0
        length = torch.where(slope > 0, torch.minimum((2 * self._kl / steep).sqrt(), losses / steep), 0.0)
        for parameter, direction in zip(self._parameters, directions, strict=True):
            parameter.sub_(direction * length[:, None, None])
