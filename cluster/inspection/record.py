"""The episode record: one JSON file for each kept episode, and all that anyone who looks into an episode reads.

    Trajectory --describe.py--> EpisodeRecord --save--> <run>/episodes/step-000012--train-44.1.json --load--> terminal, page, traces, compare

B is not in it: the log of writes rebuilds it (actors/episodes/replay.py), at a thousandth of the size. Numbers that do not exist (the loss of a write that did
not happen) are null in the file. A file is complete or absent.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from actors.types import Boundary, Outcome, PolicyVersion, StopReason, Timings, WriteRecord
from cluster.common.errors import ClusterError
from cluster.inspection.decode import DecodeError, decode

FORMAT = "engram-episode-1"
FOLDER = "episodes"  # in the folder of a run
_MOST_BYTES = 256 * 2**20  # a file larger than this is none of ours

PassageKind = Literal["system", "user", "assistant", "text", "act", "extract"]
Source = Literal["train", "evaluation"]
Receipt = Literal["passed", "off", "none"]


class RecordError(ClusterError):
    """A file that is no episode record, or a folder without one. One line: which, what is wrong, what to do."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an episode comes from. ``label``: the row or cell of an evaluation, "" in training. ``step``: training steps behind it, its own included.

    ``config`` names the YAML file beside the record with the settings that it was played under.
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
    """The tokens [start, end) of a segment: a turn that the agent read, or ("act", "extract") what it sampled."""

    kind: PassageKind
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """One stretch of context under one revision, as the agent saw it; behind each but the last the context was cleared or cut."""

    revision: int
    token_ids: tuple[int, ...]
    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class WriteEntry:
    """A line of the write log. ``after``: the number (from 0) of the segment that it came behind; -1 is before the first.

    ``unused``: the items of the extraction that became no flashcard. ``receipt``: whether the engine proved that the new revision acts.
    """

    after: int
    log: WriteRecord
    unused: tuple[str, ...]
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """A finished episode. ``siblings``: the rewards of the task's whole group, this one's included. ``ended``: seconds since 1970, about."""

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
        return sum(
            passage.end - passage.start
            for segment in self.segments
            for passage in segment.passages
            if passage.kind in ("act", "extract")
        )


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """An episode that did not finish: what is known of it."""

    origin: Origin
    task_id: str
    episode_id: str
    policy_version: PolicyVersion
    boundary: Boundary
    message: str
    ended: float


Record = EpisodeRecord | FailureRecord
_KINDS: dict[str, type[Any]] = {"episode": EpisodeRecord, "failure": FailureRecord}


def file_name(record: Record) -> str:
    """Sorts by step; two episodes of one run never share it."""
    origin = record.origin
    parts = (
        f"step-{origin.step:06d}",
        "failed" if isinstance(record, FailureRecord) else "",
        origin.label,
        record.episode_id,
    )
    words = (re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.")[:80] for part in parts)
    return "--".join(word for word in words if word) + ".json"


def save(record: Record, folder: Path) -> Path:
    """Into ``folder``, in one step. Raises OSError, with nothing half-written left behind."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    text = json.dumps(
        {"format": FORMAT, "kind": kind, **plain(asdict(record))}, ensure_ascii=False, allow_nan=False
    )
    path = folder / file_name(record)
    save_text(text, path)
    return path


def save_text(text: str, path: Path) -> None:
    """In one step: a reader finds the old file or the new one. Lone surrogates (half a character, sampled) are replaced. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def load(path: Path) -> Record:
    """Raises RecordError for a file that is missing, damaged, foreign or of another version."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecordError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB, so it is no episode record")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(
            f"{path} does not exist; python -m cluster inspect RUN lists the episodes of a run"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("kind") not in list(_KINDS):
        raise RecordError(
            f"{path}: is no episode record of format {FORMAT}; python -m cluster inspect RUN lists those of a run"
        )
    try:
        record: Record = decode(
            _KINDS[data.pop("kind")], {key: value for key, value in data.items() if key != "format"}, ""
        )
        _check(record)
    except DecodeError as error:
        raise RecordError(f"{path}: {error}") from None
    return record


def list_records(run_dir: Path) -> list[Path]:
    """The episodes of a run, by step."""
    return sorted((run_dir / FOLDER).glob("*.json"))


def _check(record: Record) -> None:
    """What the types do not say, and whoever shows or replays an episode relies on."""
    if isinstance(record, FailureRecord):
        return
    for number, segment in enumerate(record.segments):
        for place, passage in enumerate(segment.passages):
            if not 0 <= passage.start <= passage.end <= len(segment.token_ids):
                raise DecodeError(
                    f"segments[{number}].passages[{place}]: [{passage.start}, {passage.end}) is outside of the segment's tokens"
                )
    for number, write in enumerate(record.writes):
        if not -1 <= write.after < max(1, len(record.segments)):
            raise DecodeError(f"writes[{number}].after: there is no segment {write.after}")


def plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
