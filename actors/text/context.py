"""Holds the tokens of the running segment.

Invariant: the engine gets exactly the tokens of `ids`, and the closed Segment holds the same. Nothing is ever
tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from actors.types import ActionSpan, Generation, PolicyVersion, Segment, SpanKind


class Context:
    """Grows by observations (mask 0) and generations (mask 1).

    ``told``: the tokens of turns that told something to remember, and did not only ask. ``opened``: how a
    user turn begins, where the ``opening`` has begun it already (ChatFormat.opened_by).

    Truncation never drops the ``opening``: the system prompt and the text that a memory puts in front.
    """

    def __init__(self, opening: Sequence[int], opened: Sequence[int] = ()) -> None:
        self._opening = len(opening)
        self._opened = tuple(opened)
        self._ids: list[int] = list(opening)
        self._logprobs: list[float] = [0.0] * len(opening)
        self._spans: list[ActionSpan] = []
        self.told: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Tokens, the opening included."""
        return len(self._ids)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    @property
    def after_opening(self) -> tuple[int, ...]:
        """The tokens after the opening: what was read and said."""
        return tuple(self._ids[self._opening :])

    @property
    def is_fresh(self) -> bool:
        """True while there is nothing but the opening."""
        return len(self._ids) == self._opening

    @property
    def has_actions(self) -> bool:
        return bool(self._spans)

    def observe(self, ids: Sequence[int]) -> None:
        """Append tokens that the engine has not sampled."""
        if self.is_fresh and self._opened and tuple(ids[: len(self._opened)]) == self._opened:
            ids = ids[len(self._opened) :]
        self._ids += ids
        self._logprobs += [0.0] * len(ids)

    def tell(self, ids: Sequence[int]) -> None:
        """Append tokens of a turn that tells something to remember."""
        self.observe(ids)
        self.told += tuple(ids)

    def act(self, generation: Generation, kind: SpanKind) -> None:
        """Append sampled tokens with their log-probs. An empty generation leaves no trace."""
        start = len(self._ids)
        # A generation becomes several spans when the weights changed under it (actors/episodes/in_flight.py).
        self._ids += generation.token_ids
        self._logprobs += generation.logprobs
        for version, run in groupby(generation.versions or (None,) * len(generation.token_ids)):
            end = start + sum(1 for _ in run)
            self._spans.append(ActionSpan(start, end, kind, version))
            start = end

    def close(self, policy_version: PolicyVersion, revision: int) -> Segment:
        """The segment up to here, sampled under ``revision``.

        ``policy_version`` holds for the spans whose engine named no version.
        """
        # A segment is as old as its oldest token: staleness must never look smaller than it is.
        versions = (policy_version if span.version is None else span.version for span in self._spans)
        policy_version = min(versions, default=policy_version)
        mask = np.zeros(len(self._ids), dtype=np.bool_)
        for span in self._spans:
            mask[span.start : span.end] = True
        return Segment(
            token_ids=np.asarray(self._ids, dtype=np.int32),
            action_mask=mask,
            logprobs=np.asarray(self._logprobs, dtype=np.float32),
            policy_version=policy_version,
            revision=revision,
            spans=tuple(
                replace(span, version=None) if span.version == policy_version else span
                for span in self._spans
            ),
        )

    def truncated(self, limit: int) -> Context:
        """A new context of at most ``limit`` tokens: the opening and the newest tokens, all with mask 0.

        It is never shorter than the opening.
        """
        rest = self._ids[self._opening :]
        room = min(max(0, limit - self._opening), len(rest))
        kept = Context(self._ids[: self._opening], () if room else self._opened)
        kept.observe(rest[len(rest) - room :])
        kept.told = self.told
        return kept
