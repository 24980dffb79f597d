"""The stop-gradient policy objective (TMEM, arXiv 2606.04536): a pure function of values per sampled token.

    rho    = pi_{theta + sg(Delta)}(y) / pi_{theta_old + sg(Delta)}(y)      PPO's ratio, learner over learner
    w      = min(pi_{theta_old + sg(Delta)}(y) / pi_engine(y), cap)         truncated importance sampling, a
                                                                            constant: rounding and staleness
    policy = -w * min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
    kl     = w * rho * (ref / pi - log(ref / pi) - 1)                       the k3 estimate (Schulman 2020)
    loss   = sum over tokens of scale * (policy + kl_coefficient * kl)

``rho`` makes the estimate and its gradient those of KL(pi || ref) under tokens of theta_old (DeepSeek-V3.2,
arXiv 2512.02556, eq. 7). Without it one token that theta has left, in a second minibatch or from stale
weights, counts exp(its gap): thousands of nats, and after the norm's clip the only gradient.

Delta is a constant in all of it: the log-probs come from a model whose Delta carries no gradient. ``ref`` has
the same Delta. The paper does not publish clip, KL and w: they are our choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ObjectiveConfig

# exp stays finite, so the branch that the clip rejects cannot turn into 0 * inf in the backward
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """One value per sampled token, each float32 [K]. Only ``logp`` carries a gradient."""

    logp: Tensor  # under theta
    old_logp: Tensor  # under theta_old, before the step
    engine_logp: Tensor  # as sampled
    reference_logp: Tensor | None  # None without a KL term
    entropy: Tensor
    advantage: Tensor
    scale: Tensor  # see learner.types.Row


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Sums and extremes over sampled tokens, so that microbatches and ranks merge exactly.

    ``policy_loss`` and ``kl`` are sums weighted by scale.
    """

    tokens: float
    policy_loss: float
    kl: float
    ratio: float
    clipped: float
    truncated: float
    entropy: float
    difference: float
    ratio_min: float
    ratio_max: float
    difference_max: float

    @staticmethod
    def none() -> TokenStatistics:
        return TokenStatistics(0, 0, 0, 0, 0, 0, 0, 0, math.inf, -math.inf, -math.inf)

    @property
    def sums(self) -> tuple[float, ...]:
        return (
            self.tokens,
            self.policy_loss,
            self.kl,
            self.ratio,
            self.clipped,
            self.truncated,
            self.entropy,
            self.difference,
        )

    @property
    def maxima(self) -> tuple[float, ...]:
        return (-self.ratio_min, self.ratio_max, self.difference_max)

    @staticmethod
    def of(sums: tuple[float, ...], maxima: tuple[float, ...]) -> TokenStatistics:
        return TokenStatistics(*(*sums, -maxima[0], *maxima[1:]))

    def merge(self, other: TokenStatistics) -> TokenStatistics:
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return TokenStatistics.of(
            sums, tuple(max(a, b) for a, b in zip(self.maxima, other.maxima, strict=True))
        )

    def mean(self, total: float) -> float:
        return total / self.tokens if self.tokens else math.nan


def policy_objective(batch: TokenBatch, config: ObjectiveConfig) -> tuple[Tensor, TokenStatistics]:
    """Return the loss, a scalar with gradient (also for K = 0), and its statistics."""
    log_ratio = (batch.logp - batch.old_logp).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    rho = log_ratio.exp()
    clipped_rho = rho.clamp(1 - config.clip_low, 1 + config.clip_high)
    free, bounded = rho * batch.advantage, clipped_rho * batch.advantage
    weight, truncated = _importance(batch, config)
    policy = batch.scale * -(weight * torch.minimum(free, bounded))
    kl = torch.zeros_like(policy)
    if batch.reference_logp is not None:
        gap = (batch.reference_logp - batch.logp).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        kl = batch.scale * weight * rho * (gap.exp() - gap - 1)
    loss = policy.sum() + config.kl_coefficient * kl.sum()
    # where the bounded branch is the smaller one, min takes it, and the clip removes the gradient
    return loss, _statistics(batch, policy, kl, bounded < free, truncated)


def _importance(batch: TokenBatch, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    if config.importance == "none":
        return torch.ones_like(batch.engine_logp), torch.zeros_like(batch.engine_logp, dtype=torch.bool)
    ratio = (batch.old_logp - batch.engine_logp).detach().clamp(max=_MAX_LOG_RATIO).exp()
    return ratio.clamp(max=config.importance_cap), ratio > config.importance_cap


@torch.no_grad()
def _statistics(
    batch: TokenBatch, policy: Tensor, kl: Tensor, clipped: Tensor, truncated: Tensor
) -> TokenStatistics:
    if len(batch.logp) == 0:
        return TokenStatistics.none()
    gap = batch.old_logp - batch.engine_logp  # of the weights before the step, also in a later minibatch
    ratio, difference = gap.clamp(max=_MAX_LOG_RATIO).exp(), gap.abs()
    columns = (policy, kl, ratio, clipped, truncated, batch.entropy, difference)
    sums = (float(len(gap)), *(float(column.double().sum()) for column in columns))
    return TokenStatistics.of(sums, (-float(ratio.min()), float(ratio.max()), float(difference.max())))
