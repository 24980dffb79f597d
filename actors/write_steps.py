"""The steps of a write, as optimizers over the stacked B of many episodes: [n, d_out, r] a matrix, each episode with its own gradient.

SGD (the paper's) and Adam are torch's. Natural is Engram's own: the direction G^-1 grad C^-1 (sensitivity.py) in all matrices at once, as long as the
second-order model predicts a harm of ``kl`` nats per token for it; kl falls geometrically over an episode's steps, from first_kl to last_kl:

    d = G^-1 g C^-1,    dB = -sqrt(2 kl / sum over matrices of <g, d>) d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from actors.fast_weights import Basis, StackedWeights
from actors.sensitivity import Sensitivity
from configs.schema import WriteConfig


class Steps(Protocol):
    """What torch's optimizers have, too."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


def steps_of(weights: StackedWeights, basis: Basis, config: WriteConfig, totals: Sequence[int]) -> Steps:
    """The optimizer that moves ``weights`` in place. totals: steps of each episode. All are elementwise over episodes: companions stay apart."""
    leaves = [leaf.requires_grad_() for leaf in (*weights.b.values(), *weights.a.values())]
    if config.optimizer == "sgd":
        return torch.optim.SGD(leaves, lr=config.learning_rate)
    if config.optimizer == "adam":
        return torch.optim.Adam(leaves, lr=config.learning_rate)
    device = leaves[0].device
    counts = torch.tensor(totals, device=device)
    return Natural(leaves, [basis.sensitivity[name].to(device) for name in weights.b], config.first_kl, config.last_kl, counts)


class Natural:
    """See the module's text. sensitivities: of each parameter. totals: int64 [n], steps of each episode. No gradient, no movement."""

    def __init__(self, parameters: Sequence[Tensor], sensitivities: Sequence[Sensitivity], first_kl: float, last_kl: float, totals: Tensor) -> None:
        self._parameters, self._sensitivities = parameters, sensitivities
        self._first, self._fall = first_kl, (last_kl / first_kl) ** (1 / (totals - 1).clamp_min(1).float())
        self._taken = 0

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._parameters]
        directions = [one.natural(gradient) for gradient, one in zip(gradients, self._sensitivities, strict=True)]
        slope = torch.stack([(g * d).flatten(1).sum(1) for g, d in zip(gradients, directions, strict=True)]).sum(0)
        kl = self._first * self._fall**self._taken
        length = torch.where(slope > 0, (2 * kl / slope.clamp_min(torch.finfo(slope.dtype).tiny)).sqrt(), 0.0)
        for parameter, direction in zip(self._parameters, directions, strict=True):
            parameter.sub_(direction * length[:, None, None])
        self._taken += 1
