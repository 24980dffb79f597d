"""Tasks from a user's own records: texts to read, then one question. One record a line of JSON Lines, or a row of a Parquet file.

    {"texts": ["Nora moved to Lisbon.", "Omar bakes."], "question": "Where does Nora live?", "answer": ["Lisbon", "in Lisbon"]}

The reward is the token F1 against the best of the right answers. Records with the same texts are on the same side of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.environments.base import Observation, Split
from actors.environments.fields import Field, Source
from actors.environments.scoring import plain_em, plain_f1
from actors.environments.splits import held_out, passes, task_seed
from actors.protocols import TaskError
from actors.types import Answer, Outcome, Task
from configs.schema import RecordsConfig

SYSTEM_PROMPT = "Remember what you read. Answer the question in a few words."
_ONE_CATEGORY = "records"


@dataclass(frozen=True, slots=True)
class Record:
    texts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    category: str

    @property
    def key(self) -> str:
        """Decides the side of the split."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


class RecordsEnvironment:
    """The `records` task source. Raises TaskError from the constructor: the file, the line and the field."""

    name = "records"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: RecordsConfig) -> None:
        records = read_records(config)
        out = held_out([record.key for record in records], config.eval_fraction)
        self._records: dict[Split, list[Record]] = {
            "train": [record for record in records if record.key not in out],
            "eval": [record for record in records if record.key in out],
        }
        if not all(self._records.values()):
            raise TaskError(
                f"{config.path}: its records have one and the same texts, so that none can be held out: two different ones are needed"
            )

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless for train, a new order every pass; one pass for eval."""
        records = self._records[split]
        for position, place in passes(self.name, len(records), split, seed, start):
            record = records[place]
            payload = {
                "texts": list(record.texts),
                "question": record.question,
                "answers": list(record.answers),
                "category": record.category,
            }
            yield Task(
                f"records-{split}-{seed}-{position}", self.name, payload, task_seed(split, seed, position)
            )

    def start(self, task: Task) -> RecordSession:
        return RecordSession(task)


class RecordSession:
    """One episode's view of a record: its texts in order, then the question."""

    def __init__(self, task: Task) -> None:
        self._payload = task.payload
        self._turns = [Observation(text, wants_action=False) for text in task.payload["texts"]]
        self._turns.append(Observation(task.payload["question"], wants_action=True))
        self._next = 0
        self._prediction = ""

    @property
    def question(self) -> str:
        return str(self._payload["question"])

    def observe(self) -> Observation | None:
        self._next += 1
        return self._turns[self._next - 1] if self._next <= len(self._turns) else None

    def act(self, text: str) -> None:
        self._prediction = text.strip()

    def outcome(self) -> Outcome:
        gold = tuple(self._payload["answers"])
        scores = {
            "f1": max(plain_f1(self._prediction, one) for one in gold),
            "em": max(plain_em(self._prediction, one) for one in gold),
        }
        answer = Answer(self.question, gold, self._prediction, self._payload["category"], scores)
        return Outcome(reward=scores["f1"], reward_parts=dict(scores), answers=(answer,))


def read_records(config: RecordsConfig) -> list[Record]:
    """In the file's order, at least one. Raises TaskError."""
    source = Source(config.path, "environment.records.path", "a file of records (.jsonl or .parquet)")
    items = _rows(source, config) if config.path.endswith(".parquet") else source.json_lines()
    records = [_record(item, config) for item in items]
    if not records:
        raise TaskError(f"{config.path}: it has no record: give {source.setting} the path of {source.what}")
    return records


def _record(item: Field, config: RecordsConfig) -> Record:
    category = item[config.category_field].scalar() if config.category_field else _ONE_CATEGORY
    texts, answers = _one_or_more(item[config.texts_field]), _one_or_more(item[config.answer_field])
    return Record(
        texts=tuple(text.text() for text in texts),
        question=item[config.question_field].text(),
        answers=tuple(answer.scalar() for answer in answers),
        category=category,
    )


def _one_or_more(field: Field) -> list[Field]:
    if not isinstance(field.value, list):
        return [field]
    if not field.value:
        raise field.error("at least one entry")
    return field.items()


def _rows(source: Source, config: RecordsConfig) -> Iterator[Field]:
    import pyarrow as pa
    from pyarrow import parquet

    source.read_bytes(size=1)  # gives the reasons why a file cannot be read
    wanted = {config.texts_field, config.question_field, config.answer_field, config.category_field} - {""}
    try:
        file = parquet.ParquetFile(Path(source.path))
        columns = [
            name for name in file.schema_arrow.names if name in wanted
        ]  # a missing one is found with its row, like a missing field
        number = 0
        for batch in file.iter_batches(columns=columns):
            rows: list[dict[str, Any]] = batch.to_pylist()
            for row in rows:
                yield Field(source.path, f"row {number}", row)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise TaskError(f"{source.path}: not a Parquet file that can be read: {error}") from error
