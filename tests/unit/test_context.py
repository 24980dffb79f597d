"""Token ids in are token ids out, with the mask where the engine sampled."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.text.context import Context
from actors.types import ActionSpan, Generation

_STEPS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 49151), max_size=6)), max_size=10)


def _grown(steps: list[tuple[bool, list[int]]], opening: list[int]) -> Context:
    context = Context(opening)
    for sampled, ids in steps:
        if sampled:
            context.act(Generation(tuple(ids), tuple(-0.5 for _ in ids), "stop"), "act")
        else:
            context.observe(ids)
    return context


@settings(deadline=None)
@given(_STEPS)
def test_a_segment_holds_what_went_in(steps: list[tuple[bool, list[int]]]) -> None:
    context = _grown(steps, [7, 8])
    segment = context.close(policy_version=4, revision=2)
    expected = [7, 8] + [token for _, ids in steps for token in ids]
    mask = [False, False] + [sampled for sampled, ids in steps for _ in ids]
    assert context.ids == tuple(expected) and len(context) == len(expected)
    assert segment.token_ids.tolist() == expected and segment.token_ids.dtype == np.int32
    assert segment.action_mask.tolist() == mask
    assert np.array_equal(segment.logprobs, np.where(mask, np.float32(-0.5), np.float32(0)))
    assert (segment.policy_version, segment.revision) == (4, 2)


def test_spans_say_which_action_it_was() -> None:
    context = Context([1])
    context.observe([2, 3])
    context.act(Generation((4, 5), (-1.0, -2.0), "stop"), "extract")
    context.act(Generation((), (), "length"), "act")
    context.act(Generation((6,), (-3.0,), "stop"), "act")
    assert context.close(0, 0).spans == (ActionSpan(3, 5, "extract"), ActionSpan(5, 6, "act"))


@settings(deadline=None)
@given(_STEPS, st.integers(0, 40))
def test_truncation_keeps_the_opening_and_the_newest(steps: list[tuple[bool, list[int]]], limit: int) -> None:
    context = _grown(steps, [7, 8])
    before = context.ids
    kept = context.truncated(limit)
    assert kept.ids[:2] == (7, 8) and not kept.has_actions
    assert len(kept) == max(2, min(limit, len(before)))
    assert kept.ids[2:] == before[len(before) - len(kept) + 2 :]
    assert context.ids == before


def test_what_was_told_is_told_until_the_context_is_closed() -> None:
    context = Context([7, 8])
    context.observe([1, 2])
    assert not context.told and not context.truncated(3).told
    context.tell([3])
    assert context.ids == (7, 8, 1, 2, 3) and context.told == context.truncated(3).told == (3,)
