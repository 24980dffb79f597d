"""What the controller sees of a finished group: everything but tokens, log-probs and fast weights.

Only the learner needs those, and they are megabytes. Worked example: a group of four siblings with two writes
each holds 4 x 2 x 350 KB of B (SmolLM2-135M). Its summary is 5 KB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from actors.episodes.recovery import NONE_RECOVERED, Recovered
from actors.types import (
    FailedEpisode,
    Outcome,
    PolicyVersion,
    StopReason,
    Timings,
    Trajectory,
    TrajectoryGroup,
    WriteExample,
    WriteRecord,
)


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """A trajectory by its counts."""

    episode_id: str
    outcome: Outcome
    writes: tuple[WriteRecord, ...]  # without examples; of preserved replies the number alone
    stop_reason: StopReason
    timings: Timings
    segments: int
    tokens: int  # of all segments
    sampled_tokens: int  # among them

    @staticmethod
    def of(trajectory: Trajectory) -> EpisodeSummary:
        return EpisodeSummary(
            episode_id=trajectory.episode_id,
            outcome=trajectory.outcome,
            writes=tuple(_without_tokens(record) for record in trajectory.writes),
            stop_reason=trajectory.stop_reason,
            timings=trajectory.timings,
            segments=len(trajectory.segments),
            tokens=sum(len(segment.token_ids) for segment in trajectory.segments),
            sampled_tokens=sum(int(segment.action_mask.sum()) for segment in trajectory.segments),
        )


_NO_TOKENS = WriteExample((), ())


def _without_tokens(record: WriteRecord) -> WriteRecord:
    """``preserved_kl`` says something where replies were preserved, so their number is kept."""
    return replace(record, examples=(), preserved=(_NO_TOKENS,) * len(record.preserved))


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """A trajectory group by the summaries of its episodes."""

    task_id: str
    policy_version: PolicyVersion
    episodes: tuple[EpisodeSummary, ...]
    failed: tuple[FailedEpisode, ...]
    worker: str
    recovered: Recovered  # episodes of a group that another worker had begun (recovery.py)
    member: str = ""  # of environment.mix: the task's environment

    @staticmethod
    def of(group: TrajectoryGroup, recovered: Recovered = NONE_RECOVERED) -> GroupSummary:
        episodes = tuple(EpisodeSummary.of(trajectory) for trajectory in group.trajectories)
        return GroupSummary(
            group.task.id,
            group.policy_version,
            episodes,
            group.failed,
            group.worker,
            recovered,
            group.task.member,
        )
