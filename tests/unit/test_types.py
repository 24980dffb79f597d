"""The values that cross rooms refuse what cannot be, and name an adapter once."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from actors.types import (
    ActionSpan,
    AdapterKey,
    FastWeights,
    Flashcard,
    Generation,
    Outcome,
    Segment,
    Task,
    Timings,
    Trajectory,
)

SPANS = (ActionSpan(3, 5, "act"),)


def segment(length: int = 5, spans: tuple[ActionSpan, ...] = SPANS, revision: int = 0) -> Segment:
    """The example of Segment's docstring: a prompt of three tokens and a reply of two."""
    mask = np.array([False, False, False, True, True])
    logprobs = np.array([0, 0, 0, -0.4, -0.1], dtype=np.float32)
    return Segment(np.arange(length, dtype=np.int32), mask, logprobs, 3, revision, spans)


def weights(revision: int) -> FastWeights:
    return FastWeights("basis", revision, {"down_proj": np.zeros((2, 1), np.float32)} if revision else {})


def trajectory(segments: tuple[Segment, ...], revisions: tuple[FastWeights, ...]) -> Trajectory:
    outcome, timings = Outcome(1.0, {}, ()), Timings(0, 0, 0, 0, 0, 0)
    task = Task("t", "recall", {}, 0)
    return Trajectory(task, "e", 3, segments, revisions, (), {}, outcome, "done", timings)


def test_revision_k_of_a_trajectory_stands_at_place_k_minus_1() -> None:
    episode = trajectory((segment(), segment(revision=2)), (weights(1), weights(2)))
    assert episode.weights_of(episode.segments[0]) is None
    assert episode.weights_of(episode.segments[1]) is episode.revisions[1]
    copied = copy.deepcopy(episode)  # goes through the pickling protocol
    assert copied.segments[1].token_ids.tolist() == episode.segments[1].token_ids.tolist()
    with pytest.raises(ValueError, match="trajectory e: revision 2 is stored at place 1"):
        trajectory((), (weights(2), weights(1)))
    with pytest.raises(ValueError, match="trajectory e: a segment names revision 2 of 1"):
        trajectory((segment(revision=2),), (weights(1),))


def test_arrays_of_a_segment_have_one_length_and_its_spans_cover_the_mask() -> None:
    with pytest.raises(ValueError, match=r"must have one length, got \[4, 5\]"):
        segment(length=4)
    for spans in ((), (ActionSpan(3, 4, "act"),), (ActionSpan(2, 5, "act"),)):
        with pytest.raises(ValueError, match="must cover exactly its masked tokens"):
            segment(spans=spans)
    assert segment(spans=(ActionSpan(3, 4, "act"), ActionSpan(4, 5, "act", version=4))).revision == 0


def test_values_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a question and an answer, got question='Who\\?' answer=' '"):
        Flashcard("Who?", " ")
    with pytest.raises(ValueError, match="revision 1 came with 0 matrices"):
        FastWeights("basis", 1, {})
    with pytest.raises(ValueError, match="revision 0 came with 1 matrices"):
        FastWeights("basis", 0, weights(1).b)
    with pytest.raises(ValueError, match="2 tokens came with 1 log-probs and 0 versions"):
        Generation((1, 2), (-0.1,), "stop")


def test_an_adapters_name_is_its_version_episode_and_revision_and_revision_0_is_shared() -> None:
    assert AdapterKey(3, "g12.0", 2).name == "v3/g12.0@2"
    assert AdapterKey(3, "g12.0", 0).name == AdapterKey(3, "g12.1", 0).name == "v3/base"
    names = {AdapterKey(*key).name for key in ((3, "a", 1), (4, "a", 1), (3, "b", 1), (3, "a", 2))}
    assert len(names) == 4
