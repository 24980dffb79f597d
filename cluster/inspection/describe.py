"""From a finished trajectory to its record: token ids become turns, writes find the context that they came from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from actors.text.chat_template import ChatFormat
from actors.text.flashcards import unused_items
from actors.types import FailedEpisode, PolicyVersion, Segment, Trajectory, WriteRecord
from cluster.inspection.record import (
    EpisodeRecord,
    FailureRecord,
    Origin,
    Passage,
    PassageKind,
    Receipt,
    SegmentRecord,
    WriteEntry,
)


def describe(
    trajectory: Trajectory, chat: ChatFormat, origin: Origin, receipts: bool, siblings: Sequence[float]
) -> EpisodeRecord:
    """``chat`` must be of the model that played it. ``receipts``: whether the engine checked its installs (then an accepted write has passed)."""
    segments = tuple(_segment(segment, chat) for segment in trajectory.segments)
    return EpisodeRecord(
        origin=origin,
        task_id=trajectory.task.id,
        environment=trajectory.task.environment,
        episode_id=trajectory.episode_id,
        policy_version=trajectory.policy_version,
        basis_id=trajectory.revisions[0].basis_id if trajectory.revisions else "",
        segments=segments,
        writes=_writes(trajectory.writes, segments, receipts),
        memory_events=dict(trajectory.memory_events),
        outcome=trajectory.outcome,
        siblings=tuple(siblings),
        stop_reason=trajectory.stop_reason,
        timings=trajectory.timings,
        ended=time.time(),
    )


def describe_failure(failure: FailedEpisode, version: PolicyVersion, origin: Origin) -> FailureRecord:
    return FailureRecord(
        origin, failure.task_id, failure.episode_id, version, failure.boundary, failure.message, time.time()
    )


def _segment(segment: Segment, chat: ChatFormat) -> SegmentRecord:
    ids = [int(token) for token in segment.token_ids]
    passages: list[Passage] = []
    read = 0
    for span in segment.spans:
        passages += _turns(ids, read, span.start, chat)
        passages.append(Passage(span.kind, span.start, span.end, chat.decode(ids[span.start : span.end])))
        read = span.end
    passages += _turns(ids, read, len(ids), chat)
    return SegmentRecord(segment.revision, tuple(ids), tuple(passages))


def _turns(ids: Sequence[int], start: int, end: int, chat: ChatFormat) -> list[Passage]:
    return [
        Passage(cast(PassageKind, turn.role), start + turn.start, start + turn.end, turn.text)
        for turn in chat.turns(ids[start:end])
    ]


def _writes(
    log: Sequence[WriteRecord], segments: Sequence[SegmentRecord], receipts: bool
) -> tuple[WriteEntry, ...]:
    """The log does not say which context a write came from: it is the one in which its text was said, else the last under the revision before it."""
    entries: list[WriteEntry] = []
    place, before = 0, 0
    for record in log:
        said = [
            number
            for number, segment in enumerate(segments)
            if number >= place and _says(segment, record.extraction)
        ]
        older = [number for number, segment in enumerate(segments) if segment.revision <= before]
        after = said[0] if said else max([place - 1, *older[-1:]])
        place, before = (after + 1 if said else place), record.revision
        receipt: Receipt = "none" if record.outcome != "accepted" else "passed" if receipts else "off"
        unused = unused_items(record.extraction, record.flashcards) if record.rejected_flashcards else ()
        entries.append(WriteEntry(after, record, unused, receipt))
    return tuple(entries)


def _says(segment: SegmentRecord, text: str) -> bool:
    return any(passage.kind == "extract" and passage.text == text for passage in segment.passages)
