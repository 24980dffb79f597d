"""What a step of the learner did, in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.types import PolicyVersion
from configs.schema import ObjectiveConfig
from learner.batch import Minibatch, has_signal
from learner.objective import TokenStatistics
from learner.types import ScoredTrajectory, StepReport


@dataclass(frozen=True, slots=True)
class Done:
    """statistics: of all ranks. norms: of each optimizer step's gradient. rate: the learning rate."""

    statistics: TokenStatistics
    norms: Sequence[float]
    rate: float
    seconds: float


def step_report(
    version: PolicyVersion,
    objective: ObjectiveConfig,
    scored_groups: Sequence[Sequence[ScoredTrajectory]],
    minibatches: Sequence[Minibatch],
    done: Done,
) -> StepReport:
    """Put it together. ``version``: the policy's behind the step."""
    statistics = done.statistics
    row_sets = [minibatch.rows for minibatch in minibatches]
    segments = [row.segment for row_set in row_sets for row in row_set.rows]
    microbatches = [microbatch for one in minibatches for rank in one.ranks for microbatch in rank]
    used = sum(any(map(has_signal, group)) for group in scored_groups)
    episodes = [episode for group in scored_groups for episode in group]
    advantages = [abs(one) for episode in episodes for one in episode.by_question or (episode.advantage,)]
    tokens = sum(len(segment.token_ids) for segment in segments)
    places = sum(microbatch.token_ids.size for microbatch in microbatches)
    policy_loss = kl = math.nan  # no forward: no signal
    if statistics.tokens:
        # an idle minibatch has a policy loss of 0, and a KL that nobody measured
        policy_loss, kl = statistics.policy_loss / len(minibatches), statistics.kl / len(done.norms)
    return StepReport(
        version=version,
        optimizer_steps=len(done.norms),
        loss=policy_loss + objective.kl_coefficient * kl,
        policy_loss=policy_loss,
        kl=kl,
        ratio_mean=statistics.mean(statistics.ratio),
        ratio_min=statistics.ratio_min if statistics.tokens else math.nan,
        ratio_max=statistics.ratio_max if statistics.tokens else math.nan,
        clip_fraction=statistics.mean(statistics.clipped),
        truncated_fraction=statistics.mean(statistics.truncated),
        entropy=statistics.mean(statistics.entropy),
        engine_logprob_diff_mean=statistics.mean(statistics.difference),
        engine_logprob_diff_max=statistics.difference_max if statistics.tokens else math.nan,
        grad_norm=sum(done.norms) / len(done.norms) if done.norms else math.nan,
        learning_rate=done.rate,
        tokens=tokens,
        action_tokens=sum(int(segment.action_mask.sum()) for segment in segments),
        extract_tokens=sum(row_set.extract_tokens for row_set in row_sets),
        padding_fraction=1 - tokens / places if tokens else 0.0,
        microbatches=len(microbatches),
        segments_without_actions=sum(row_set.segments_without_actions for row_set in row_sets),
        trajectories=len(episodes),
        trajectories_skipped=sum(row_set.trajectories_skipped for row_set in row_sets),
        groups_used=used,
        groups_without_signal=len(scored_groups) - used,
        mean_advantage_abs=sum(advantages) / len(advantages),
        seconds=done.seconds,
    )
