"""What the controller looks at of a finished group: everything but tokens, log-probs and fast weights.

Those are megabytes a group and of use to the learner alone; the summary is a few kilobytes. Worked example: a group of four siblings with two writes
each is 4 x 2 x 350 KB of B (SmolLM2-135M), and a summary of 5 KB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from actors.episodes.recovery import Recovered
from actors.types import (
    FailedEpisode,
    Outcome,
    PolicyVersion,
    StopReason,
    Timings,
    Trajectory,
    TrajectoryGroup,
    WriteRecord,
)


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """A trajectory by its counts. ``tokens`` are those of all segments, ``sampled_tokens`` of them were sampled; the writes are without examples."""

    episode_id: str
    outcome: Outcome
    writes: tuple[WriteRecord, ...]
    stop_reason: StopReason
    timings: Timings
    segments: int
    tokens: int
    sampled_tokens: int

    @staticmethod
    def of(trajectory: Trajectory) -> EpisodeSummary:
        return EpisodeSummary(
            episode_id=trajectory.episode_id,
            outcome=trajectory.outcome,
            writes=tuple(replace(record, examples=()) for record in trajectory.writes),
            stop_reason=trajectory.stop_reason,
            timings=trajectory.timings,
            segments=len(trajectory.segments),
            tokens=sum(len(segment.token_ids) for segment in trajectory.segments),
            sampled_tokens=sum(int(segment.action_mask.sum()) for segment in trajectory.segments),
        )


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """A trajectory group by its episodes' summaries. ``recovered`` counts those that a lost worker began, see actors/episodes/recovery.py."""

    task_id: str
    policy_version: PolicyVersion
    episodes: tuple[EpisodeSummary, ...]
    failed: tuple[FailedEpisode, ...]
    worker: str
    recovered: Recovered

    @staticmethod
    def of(group: TrajectoryGroup) -> GroupSummary:
        episodes = tuple(EpisodeSummary.of(trajectory) for trajectory in group.trajectories)
        return GroupSummary(
            group.task.id, group.policy_version, episodes, group.failed, group.worker, Recovered(0, 0)
        )
