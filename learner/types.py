"""The values of the learner, one type per stage:

    TrajectoryGroup --advantage.py--> ScoredTrajectory --batch.py--> Row --batch.py--> Microbatch
                                                                 --learner.py--> StepReport

Values are frozen and complete at construction. This module imports numpy and ``actors.types`` only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.types import ActionSpan, FastWeights, PolicyVersion, Segment, Trajectory


class LearnerError(RuntimeError):
    """The learner cannot go on. The message has the numbers and the cure.

    Weights and optimizer are as before the call, unless the message says otherwise (see ``Learner.step``).
    """


class LearnerLost(LearnerError):
    """A rank died, is late, or failed by no fault of its input. A learner that is started again may go on."""


class UnreadableError(LearnerError):
    """A file of a checkpoint cannot be read as what it is. Another checkpoint may be whole."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTrajectory:
    """An episode and its advantage A_hat (TMEM, arXiv 2606.04536).

    All sampled tokens of the episode share the advantage, extraction tokens included. With credit by question
    ``by_question`` has the advantage of each answer's own score, and tokens have that of what they served.
    """

    trajectory: Trajectory
    advantage: float
    by_question: tuple[float, ...] = ()  # empty: credit by episode

    def advantage_of(self, span: ActionSpan) -> float:
        """The advantage of the tokens in ``span``; 0 where they served no question."""
        if not self.by_question or span.serves is None:
            return self.advantage
        served = [self.by_question[place] for place in span.serves]
        return sum(served) / len(served) if served else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One segment as the learner trains on it.

    Over all segments of an optimizer step, scale x sampled tokens sums to 1. That holds for each aggregation
    and packing, and counts the segments that need no forward.
    """

    segment: Segment
    weights: FastWeights | None  # the Delta in force when the segment was sampled; None: Delta = 0
    advantage: float | NDArray[np.float32]  # of all its tokens, or [T] of each
    scale: float  # weight of each sampled token in the loss


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """What one forward sees: n rows, padded on the right to T tokens.

    An empty microbatch (no sampled token) keeps ranks in step under ZeRO-3.
    """

    token_ids: NDArray[np.int64]  # [n, T], 0 as padding
    attention_mask: NDArray[np.bool_]  # [n, T]
    loss_mask: NDArray[np.bool_]  # [n, T], True on sampled tokens
    engine_logprobs: NDArray[np.float32]  # [n, T]
    advantages: NDArray[np.float32]  # [n, T]
    scales: NDArray[np.float32]  # [n]
    weights: tuple[FastWeights | None, ...]  # n
    temperature: float | NDArray[np.float32]  # of sampling: of all sampled tokens, or [K] of each

    def __post_init__(self) -> None:
        arrays = (self.token_ids, self.attention_mask, self.loss_mask, self.engine_logprobs, self.advantages)
        shapes = {array.shape for array in arrays}
        rows = {len(self.token_ids), len(self.scales), len(self.weights)}
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
        """The row of each sampled token, int64 [K], in row-major order.

        Every array with one value per sampled token has this order.
        """
        return np.nonzero(self.loss_mask)[0]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One RL step.

    Means, extremes and fractions are over the sampled tokens that were evaluated; NaN where there are none.
    ratio_* and engine_logprob_diff_* compare the learner's weights *before* the step with the engine's. With
    stale groups they mix rounding with the policy's own movement.
    """

    version: PolicyVersion
    optimizer_steps: int  # 0: no signal, so weights, Adam's state and version stayed
    loss: float  # policy_loss + kl_coefficient * kl
    policy_loss: float  # weighted like the loss, as is kl
    kl: float  # of the minibatches that made an optimizer step
    ratio_mean: float  # learner over engine probability
    ratio_min: float
    ratio_max: float
    clip_fraction: float  # tokens whose gradient the clip removed
    truncated_fraction: float  # tokens whose importance weight hit the cap
    entropy: float  # nats
    engine_logprob_diff_mean: float  # absolute difference of log-probs
    engine_logprob_diff_max: float
    grad_norm: float  # before clipping; mean over optimizer steps
    learning_rate: float  # 0 without an optimizer step
    tokens: int  # through the model, without padding
    action_tokens: int  # among them: sampled
    extract_tokens: int  # among those: sampled for the memory, e.g. flashcards
    padding_fraction: float
    microbatches: int
    segments_without_actions: int  # dropped
    trajectories: int
    trajectories_skipped: int  # no trained token has an advantage: no forward, but still in the denominator
    groups_used: int  # with an episode of which a trained token has an advantage
    groups_without_signal: int
    mean_advantage_abs: float  # over episodes, or over their questions with credit by question
    seconds: float


@dataclass(frozen=True, slots=True)
class WarmStartReport:
    """One supervised step."""

    version: PolicyVersion
    loss: float  # mean nats per target token, before the step
    grad_norm: float
    tokens: int  # target tokens
    seconds: float
