"""What both views say of an episode, in the same words: plain text, no markup. Whoever shows it escapes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.inspection.record import EpisodeRecord, FailureRecord, Passage, Record, SegmentRecord, WriteEntry

NAMES = {
    "system": "system prompt",
    "user": "told",
    "assistant": "reply (not its own)",
    "text": "what was left of an earlier turn",
}
NAMES |= {"act": "agent", "extract": "agent, to its memory"}
_STRETCH = 8  # tokens that one context does not end and the next begin with by chance


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing that happened, in order: a context opens, a passage is read or said, a write follows, the context is emptied."""

    kind: Literal["context", "passage", "write", "cleared"]
    title: str
    number: int
    passage: Passage | None
    write: WriteEntry | None


def pieces(record: EpisodeRecord) -> Iterator[Piece]:
    """The episode from its beginning to its end, without the answers."""
    yield from _writes(record, -1)
    last = len(record.segments) - 1
    for number, segment in enumerate(record.segments):
        yield Piece("context", context_line(number, segment), number, None, None)
        for passage in segment.passages:
            yield Piece("passage", NAMES[passage.kind], number, passage, None)
        yield from _writes(record, number)
        if number < last:
            yield Piece("cleared", cleared_line(record, number), number, None, None)


def _writes(record: EpisodeRecord, number: int) -> Iterator[Piece]:
    for write in record.writes:
        if write.after == number:
            yield Piece("write", write_line(write), number, None, write)


def context_line(number: int, segment: SegmentRecord) -> str:
    state = (
        "no fast weights (Delta = 0)"
        if segment.revision == 0
        else f"fast weights of revision {segment.revision}"
    )
    return f"Context {number + 1} · {len(segment.token_ids)} tokens · {state}"


def cleared_line(record: EpisodeRecord, number: int) -> str:
    """A context that begins, right behind the system turn, with the end of the one before it was cut; any other was cleared."""
    before, after = record.segments[number].token_ids, record.segments[number + 1]
    opening = next((passage.end for passage in after.passages if passage.kind == "system"), 0)
    first = next(
        (passage for passage in after.passages if passage.start >= opening and passage.kind != "system"), None
    )
    latest = (
        opening if first is None else first.start + (first.kind == "text")
    )  # a whole turn has its opening in front
    for start in range(opening, latest):
        kept = after.token_ids[start : start + _STRETCH]
        for place in range(len(before) - _STRETCH + 1):
            if (
                before[place : place + _STRETCH] == kept
                and before[place:] == after.token_ids[start : start + len(before) - place]
            ):
                return "context cut: its newest tokens stay"
    return "context cleared"


def write_line(write: WriteEntry) -> str:
    log = write.log
    if log.outcome == "empty":
        return f"Nothing was written: {log.reason}"
    losses = f"loss {number(log.loss_before)} -> {number(log.loss_after)}"
    cost = f"{log.steps} steps, {log.seconds:.2f} s, {len(log.examples)} examples of {log.prompt_tokens} + {log.answer_tokens} tokens"
    if log.outcome == "rolled_back":
        return f"Write rolled back: {log.reason} · {losses} · {cost}"
    receipt = {"passed": "receipt passed", "off": "receipts are off", "none": "no receipt"}[write.receipt]
    return f"Write: revision {log.revision} · {losses} · {cost} · {receipt}"


def head_line(record: Record) -> str:
    origin = record.origin
    where = f"step {origin.step}" if origin.source == "train" else f"{origin.label}, after step {origin.step}"
    return f"{origin.run} · {where} · task {record.task_id} · episode {record.episode_id}"


def facts(record: Record) -> list[tuple[str, str]]:
    """(name, value) of what holds for the whole episode."""
    origin = record.origin
    common = [
        ("model", origin.model),
        ("policy version", str(record.policy_version)),
        ("memory", origin.memory),
        ("worker", origin.worker),
    ]
    if isinstance(record, FailureRecord):
        return [*common, ("failed at", record.boundary), ("why", record.message)]
    times = record.timings
    spent = ", ".join(
        f"{name} {getattr(times, name):.2f}" for name in ("act", "extract", "write", "install", "environment")
    )
    events = ", ".join(f"{name} {count}" for name, count in record.memory_events.items())
    parts = ", ".join(f"{name} {number(value)}" for name, value in record.outcome.reward_parts.items())
    siblings = ", ".join(number(reward) for reward in record.siblings)
    found = [
        *common,
        ("environment", record.environment),
        ("reward", f"{number(record.outcome.reward)}{f' ({parts})' if parts else ''}"),
        ("siblings' rewards", siblings if len(record.siblings) > 1 else ""),
        (
            "ended",
            {"done": "when all was answered", "max_turns": "at the most turns allowed"}[record.stop_reason],
        ),
        (
            "tokens",
            f"{record.tokens} in {len(record.segments)} contexts, {record.sampled_tokens} of them sampled",
        ),
        ("seconds", f"{times.total:.2f} ({spent})"),
        ("memory events", events),
    ]
    return [(name, value) for name, value in found if value]


def unshown(record: EpisodeRecord) -> str:
    """What a record cannot show: contexts without a sampled token are no part of a trajectory."""
    if record.origin.memory in ("truncation", "raw", "paging", "notes"):
        return f"Contexts in which the agent said nothing are not recorded (memory policy {record.origin.memory})."
    return ""


def number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def scores_text(scores: object) -> str:
    return (
        ", ".join(f"{name} {number(value)}" for name, value in scores.items())
        if isinstance(scores, dict)
        else ""
    )
