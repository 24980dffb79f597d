"""The episode record: what is kept of an episode, how a trajectory becomes one, and its file.

    Trajectory --describe--> EpisodeRecord --save--> RUN/episodes/step-000012--train-44.1.json
    the file --load--> EpisodeRecord --> terminal, page, traces, compare, export

The matrices B are not in it. The log of writes rebuilds them (actors/episodes/recovery.py), at a thousandth
of the size. A number that does not exist, such as the loss of an empty write, is NaN here, null in the file.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from actors.episodes.attribution import generations
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import unused_items
from actors.types import (
    Boundary,
    FailedEpisode,
    Outcome,
    PolicyVersion,
    Segment,
    StopReason,
    Timings,
    Trajectory,
    WriteRecord,
)
from cluster.common.errors import ClusterError
from configs.files import FileError, parse_json, write_text

FORMAT = "engram-episode-1"
FOLDER = "episodes"  # in the folder of a run
_MOST_BYTES = 256 * 2**20
_CURE = "engram inspect RUN lists the episodes of a run"

PassageKind = Literal["system", "user", "assistant", "text", "act", "extract"]
Source = Literal["train", "evaluation"]
Receipt = Literal["passed", "off", "none"]


class RecordError(ClusterError):
    """A file is no episode record, or a folder holds none. One line: which, what is wrong, what to do."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an episode comes from.

    ``label``: the row or cell of an evaluation, "" in training.
    ``step``: the training steps behind it, its own included.
    ``config``: the name of the YAML file beside the record that holds the settings.
    """

    run: str
    source: Source
    label: str
    step: int
    worker: str
    model: str
    memory: str
    config: str


@dataclass(frozen=True, slots=True)
class Passage:
    """The tokens [start, end) of a segment: a turn that the agent read, or sampled (act, extract)."""

    kind: PassageKind
    start: int
    end: int
    text: str

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A context under one revision, as the agent saw it. After all but the last it was cleared or cut."""

    revision: int
    token_ids: tuple[int, ...]
    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class WriteEntry:
    """A line of the write log.

    ``after``: the number of the segment before the write, from 0; -1 if the write came first.
    ``unused``: the items of the extraction that became no flashcard.
    ``receipt``: whether the engine proved that the new revision acts.
    """

    after: int
    log: WriteRecord
    unused: tuple[str, ...]
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """A finished episode. ``siblings``: the rewards of the whole group. ``ended``: s since 1970, about."""

    origin: Origin
    task_id: str
    environment: str
    episode_id: str
    policy_version: PolicyVersion
    basis_id: str
    segments: tuple[SegmentRecord, ...]
    writes: tuple[WriteEntry, ...]
    memory_events: Mapping[str, int]
    outcome: Outcome
    siblings: tuple[float, ...]
    stop_reason: StopReason
    timings: Timings
    ended: float

    @property
    def tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def sampled_tokens(self) -> int:
        return self.tokens_of("act") + self.tokens_of("extract")

    def tokens_of(self, kind: PassageKind) -> int:
        passages = (passage for segment in self.segments for passage in segment.passages)
        return sum(passage.tokens for passage in passages if passage.kind == kind)


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """An episode that did not finish."""

    origin: Origin
    task_id: str
    episode_id: str
    policy_version: PolicyVersion
    boundary: Boundary
    message: str
    ended: float


Record = EpisodeRecord | FailureRecord
_KINDS: dict[str, type[Record]] = {"episode": EpisodeRecord, "failure": FailureRecord}


# --- from a trajectory -------------------------------------------------------------------------------------


def describe(
    trajectory: Trajectory, chat: ChatFormat, origin: Origin, receipts: bool, siblings: Sequence[float]
) -> EpisodeRecord:
    """Make the record of ``trajectory``. ``chat`` must be that of the model that played it.

    ``receipts``: whether the engine checked its installs. Then an accepted write has passed its receipt.
    """
    segments = tuple(_segment(segment, chat) for segment in trajectory.segments)
    return EpisodeRecord(
        origin=origin,
        task_id=trajectory.task.id,
        environment=trajectory.task.environment,
        episode_id=trajectory.episode_id,
        policy_version=trajectory.policy_version,
        basis_id=trajectory.revisions[0].basis_id if trajectory.revisions else "",
        segments=segments,
        writes=_entries(trajectory.writes, segments, receipts, chat),
        memory_events=dict(trajectory.memory_events),
        outcome=trajectory.outcome,
        siblings=tuple(siblings),
        stop_reason=trajectory.stop_reason,
        timings=trajectory.timings,
        ended=time.time(),
    )


def describe_failure(failure: FailedEpisode, version: PolicyVersion, origin: Origin) -> FailureRecord:
    task, episode = failure.task_id, failure.episode_id
    return FailureRecord(origin, task, episode, version, failure.boundary, failure.message, time.time())


def _segment(segment: Segment, chat: ChatFormat) -> SegmentRecord:
    ids = [int(token) for token in segment.token_ids]
    passages: list[Passage] = []
    place = 0
    for spans in generations(segment):
        start, end = spans[0].start, spans[-1].end
        passages += _turns(ids, place, start, chat)
        passages.append(Passage(spans[0].kind, start, end, chat.decode(ids[start:end])))
        place = end
    passages += _turns(ids, place, len(ids), chat)
    return SegmentRecord(segment.revision, tuple(ids), tuple(passages))


def _turns(ids: Sequence[int], start: int, end: int, chat: ChatFormat) -> list[Passage]:
    """The turns in the tokens [start, end), which the agent did not sample."""
    turns = chat.turns(ids[start:end])
    return [
        Passage(cast(PassageKind, turn.role), start + turn.start, start + turn.end, turn.text)
        for turn in turns
    ]


def _entries(
    log: Sequence[WriteRecord], segments: Sequence[SegmentRecord], receipts: bool, chat: ChatFormat
) -> tuple[WriteEntry, ...]:
    """Find the segment that each write came after. The log itself does not name it.

    It is the next segment that holds the text of the write. Where there is none (a memory that writes what it
    read), it is the last segment under the revision before.
    """
    entries: list[WriteEntry] = []
    place, before = 0, 0  # the first segment that can come next; the revision in force
    for record in log:
        later = range(place, len(segments))
        source = next((at for at in later if _extracts(segments[at], record.extraction, chat)), None)
        if source is None:
            older = [at for at, segment in enumerate(segments) if segment.revision <= before]
            after = max([place - 1, *older[-1:]])
        else:
            after, place = source, source + 1
        before = record.revision
        receipt: Receipt = "none" if record.outcome != "accepted" else "passed" if receipts else "off"
        unused = unused_items(record.extraction, record.flashcards) if record.rejected_flashcards else ()
        entries.append(WriteEntry(after, record, unused, receipt))
    return tuple(entries)


def _extracts(segment: SegmentRecord, text: str, chat: ChatFormat) -> bool:
    sampled = (passage for passage in segment.passages if passage.kind == "extract")
    return any(chat.said(segment.token_ids[passage.start : passage.end]) == text for passage in sampled)


# --- the file ----------------------------------------------------------------------------------------------


def file_name(record: Record) -> str:
    """Name the record's file: names sort by step, and no two episodes of a run share one."""
    step, failed = f"step-{record.origin.step:06d}", isinstance(record, FailureRecord)
    parts = (step, "failed" if failed else "", record.origin.label, record.episode_id)
    words = (re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.")[:80] for part in parts)
    return "--".join(word for word in words if word) + ".json"


def save(record: Record, folder: Path) -> Path:
    """Write the record into ``folder``. Raises OSError; the file is whole or absent."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    content = {"format": FORMAT, "kind": kind, **plain(asdict(record))}
    path = folder / file_name(record)
    save_text(json.dumps(content, ensure_ascii=False, allow_nan=False), path)
    return path


def save_text(text: str, path: Path) -> None:
    """Write ``text`` as ``write_text`` does, in a new folder if need be. Raises OSError.

    Half a character (a lone surrogate, which a model may sample) becomes "?".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def load(path: Path) -> Record:
    """Read a record. Raises RecordError for a file that is missing, damaged, foreign or too new."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecordError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB, so it is no episode record")
        data = json.loads(path.read_bytes(), object_hook=_with_losses)
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist; {_CURE}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(f"{path}: cannot be read as JSON ({reason})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("kind") not in list(_KINDS):
        raise RecordError(f"{path}: is no episode record of format {FORMAT}; {_CURE}")
    try:
        record = parse_json(json.dumps(data), _KINDS[data["kind"]])
    except FileError as error:
        raise RecordError(f"{path}: {error}") from None
    if isinstance(record, EpisodeRecord) and (fault := _fault(record)):
        raise RecordError(f"{path}: {fault}")
    return record


def is_of_training(path: Path) -> bool:
    """Whether a record's file is of a training episode: it has no label."""
    parts = path.name.split("--")
    return len(parts) == (3 if parts[1:2] == ["failed"] else 2)


def list_records(run_dir: Path) -> list[Path]:
    """List the files of a run's episodes, by step."""
    return sorted((run_dir / FOLDER).glob("*.json"))


def _with_losses(values: dict[str, Any]) -> dict[str, Any]:
    """Read null as NaN where it is a loss: JSON has no NaN."""
    return {
        key: math.nan if value is None and key in ("loss_before", "loss_after") else value
        for key, value in values.items()
    }


def _fault(record: EpisodeRecord) -> str:
    """Say what is wrong with values of the right type, "" if nothing. Views and replay rely on them."""
    for number, segment in enumerate(record.segments):
        for place, passage in enumerate(segment.passages):
            if not 0 <= passage.start <= passage.end <= len(segment.token_ids):
                return (
                    f"segments.{number}.passages.{place}: "
                    f"[{passage.start}, {passage.end}) is outside of the segment's tokens"
                )
    for number, write in enumerate(record.writes):
        if not -1 <= write.after < max(1, len(record.segments)):
            return f"writes.{number}.after: there is no segment {write.after}"
    return ""


def plain(value: Any) -> Any:
    """Replace what JSON has not: a number that is not finite becomes None, a tuple a list."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
