"""What the update would be without one of the method's parts, to show what that part is worth: episodes as sampled -> as an ablation sees them.

objective.credit=actions     no gradient on extraction tokens: nobody is told that a flashcard was good
objective.snapshot=final     every segment is scored under the episode's last Delta, not under the one that it was sampled under: a biased gradient.
                             How far it is off is `learner/engine_logprob_diff_mean` of such a run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.types import Segment, Trajectory
from configs.schema import ObjectiveConfig
from learner.types import ScoredTrajectory


def as_objective_sees(
    scored: Sequence[ScoredTrajectory], objective: ObjectiveConfig
) -> Sequence[ScoredTrajectory]:
    """``scored`` itself for the method as it is."""
    if objective.credit == "all" and objective.snapshot == "own":
        return scored
    return [replace(one, trajectory=_seen(one.trajectory, objective)) for one in scored]


def _seen(trajectory: Trajectory, objective: ObjectiveConfig) -> Trajectory:
    segments = trajectory.segments
    if objective.credit == "actions":
        segments = tuple(map(_without_extractions, segments))
    if objective.snapshot == "final":
        segments = tuple(replace(segment, revision=len(trajectory.revisions)) for segment in segments)
    return replace(trajectory, segments=segments)


def _without_extractions(segment: Segment) -> Segment:
    spans = tuple(span for span in segment.spans if span.kind != "extract")
    mask = np.zeros_like(segment.action_mask)
    for span in spans:
        mask[span.start : span.end] = True
    return replace(
        segment, action_mask=mask, logprobs=np.where(mask, segment.logprobs, np.float32(0)), spans=spans
    )
