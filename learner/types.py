"""The values of the learner, one type per stage:

    TrajectoryGroup --advantage.py--> ScoredTrajectory --batch.py--> Row --batch.py--> Microbatch --learner.py--> StepReport

Values are frozen and complete at construction. This module imports numpy and ``actors.types`` only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.types import FastWeights, PolicyVersion, Segment, Trajectory


class LearnerError(RuntimeError):
    """The learner cannot go on; the message has the numbers and the cure. Weights and optimizer state are as before the call
    unless it says otherwise (see ``Learner.step``)."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTrajectory:
    """An episode and its advantage A_hat: the same for every sampled token of it, extraction tokens included (TMEM, arXiv 2606.04536)."""

    trajectory: Trajectory
    advantage: float


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One segment as the learner trains on it: ``weights`` is the Delta in force when it was sampled (None: Delta = 0).

    ``scale`` is the weight of each sampled token in the loss. Over all segments of an optimizer step, those that need no forward included,
    scale x sampled tokens sums to 1, whatever the aggregation and however the rows are packed.
    """

    segment: Segment
    weights: FastWeights | None
    advantage: float
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """What one forward sees: n rows padded on the right to T tokens. An empty one (no sampled token) keeps ranks in step under ZeRO-3.

    token_ids int64 [n, T] (0 as padding), attention_mask bool [n, T], loss_mask bool [n, T] on sampled tokens, engine_logprobs float32 [n, T],
    advantages float32 [n], scales float32 [n], weights: one per row. ``temperature`` is that of sampling.
    """

    token_ids: NDArray[np.int64]
    attention_mask: NDArray[np.bool_]
    loss_mask: NDArray[np.bool_]
    engine_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    scales: NDArray[np.float32]
    weights: tuple[FastWeights | None, ...]
    temperature: float

    def __post_init__(self) -> None:
        shapes = {
            self.token_ids.shape,
            self.attention_mask.shape,
            self.loss_mask.shape,
            self.engine_logprobs.shape,
        }
        rows = {len(self.token_ids), len(self.advantages), len(self.scales), len(self.weights)}
        if len(shapes) != 1 or len(rows) != 1:
            raise ValueError(
                f"a microbatch's arrays must agree, got shapes {sorted(shapes)} and row counts {sorted(rows)}"
            )
        if self.loss_mask[:, 0].any() or (self.loss_mask & ~self.attention_mask).any():
            raise ValueError("a sampled token needs a token before it and cannot be padding")

    @property
    def action_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def row_of_token(self) -> NDArray[np.int64]:
        """The row of each sampled token, int64 [K], in row-major order: the order of everything that is one value per sampled token."""
        return np.nonzero(self.loss_mask)[0]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One RL step. Token statistics are over the sampled tokens that were evaluated; NaN where a step evaluated none.

    ``loss`` = policy_loss + kl_coefficient * kl; policy_loss and kl are weighted like the loss. ratio_* is learner over engine probability and
    engine_logprob_diff_* the absolute difference of their log-probs, both of the learner's weights *before* the step: with stale groups they mix
    rounding with the policy's own movement. ``entropy`` is in nats. ``clip_fraction``: tokens whose gradient the clip removed;
    ``truncated_fraction``: tokens whose importance weight hit the cap. ``grad_norm`` is before clipping (mean over minibatches).
    ``tokens`` went through the model (padding not counted), ``action_tokens`` of them were sampled, ``extract_tokens`` of those wrote flashcards.
    ``segments_without_actions`` were dropped; ``trajectories_skipped`` had advantage 0 and needed no forward (they still count in the denominator).
    """

    version: PolicyVersion
    loss: float
    policy_loss: float
    kl: float
    ratio_mean: float
    ratio_min: float
    ratio_max: float
    clip_fraction: float
    truncated_fraction: float
    entropy: float
    engine_logprob_diff_mean: float
    engine_logprob_diff_max: float
    grad_norm: float
    learning_rate: float
    tokens: int
    action_tokens: int
    extract_tokens: int
    padding_fraction: float
    microbatches: int
    segments_without_actions: int
    trajectories: int
    trajectories_skipped: int
    groups_used: int
    groups_without_signal: int
    mean_advantage_abs: float
    seconds: float


@dataclass(frozen=True, slots=True)
class WarmStartReport:
    """One supervised step. ``loss`` is mean nats per target token before the step; ``tokens`` are target tokens."""

    version: PolicyVersion
    loss: float
    grad_norm: float
    tokens: int
    seconds: float
