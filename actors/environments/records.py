"""Tasks from a user's own records: texts to read, then one question.

A record is a line of JSON Lines, or a row of a Parquet file. The names of its fields are configured.

    {"texts": ["Nora moved to Lisbon.", "Omar bakes."],
     "question": "Where does Nora live?",
     "answer": ["Lisbon", "in Lisbon"]}

The reward is the token F1 against the best of the right answers. Records with the same texts are on the same
side of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from actors.environments.base import ReadThenAsk, Split, held_out, passes, task_seed
from actors.environments.data_file import DataFile, Text, TextOrNumber, Texts, TextsOrNumbers
from actors.environments.scoring import plain_em, plain_f1
from actors.protocols import TaskError
from actors.types import Answer, Outcome, Task
from configs.files import one_line
from configs.schema import RecordsConfig

SYSTEM_PROMPT = "Remember what you read. Answer the question in a few words."
_NO_CATEGORY = "records"


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
    """The `records` task source."""

    name = "records"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: RecordsConfig) -> None:
        """Raises TaskError when the file is malformed or nothing can be held out."""
        records = read_records(config)
        out = held_out([record.key for record in records], config.eval_fraction)
        self._records: dict[Split, list[Record]] = {
            "train": [record for record in records if record.key not in out],
            "eval": [record for record in records if record.key in out],
        }
        if not all(self._records.values()):
            raise TaskError(
                f"{config.path}: all its records have the same texts, so none can be held out: "
                "at least two records with different texts are needed"
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


class RecordSession(ReadThenAsk):
    """One episode: the texts in order, then the question."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.payload["texts"], [task.payload["question"]])
        self._right_answers = tuple(task.payload["answers"])
        self._category = task.payload["category"]

    def outcome(self) -> Outcome:
        (prediction,) = self.answers
        scores = {
            "f1": max(plain_f1(prediction, right) for right in self._right_answers),
            "em": max(plain_em(prediction, right) for right in self._right_answers),
        }
        answer = Answer(self.question, self._right_answers, prediction, self._category, scores)
        return Outcome(reward=scores["f1"], reward_parts=dict(scores), answers=(answer,))


def read_records(config: RecordsConfig) -> list[Record]:
    """All records, in the file's order: at least one. Raises TaskError."""
    file = DataFile(config.path, "environment.records.path", "a file of records (.jsonl or .parquet)")
    kind = _columns(config)
    is_table = config.path.endswith(".parquet")
    rows = _rows(file, kind) if is_table else (row for _, row in file.lines(kind))
    records = [Record(tuple(row.texts), row.question, tuple(row.answers), row.category) for row in rows]
    if not records:
        raise file.empty("records")
    return records


def _columns(config: RecordsConfig) -> Any:
    """A pydantic model that reads the configured columns, so that its messages name them."""
    category: Any = (TextOrNumber, Field(alias=config.category_field))
    return create_model(
        "Columns",
        texts=(Texts, Field(alias=config.texts_field)),
        question=(Text, Field(alias=config.question_field)),
        answers=(TextsOrNumbers, Field(alias=config.answer_field)),
        category=category if config.category_field else (str, _NO_CATEGORY),
    )


def _rows(file: DataFile, kind: type[BaseModel]) -> Iterator[Any]:
    """The rows of a Parquet file, batch by batch."""
    import pyarrow as pa
    from pyarrow import parquet

    file.open().close()  # says why a file cannot be read
    wanted = {field.alias for field in kind.model_fields.values()}
    try:
        table = parquet.ParquetFile(Path(file.path))
        columns = [name for name in table.schema_arrow.names if name in wanted]
        rows = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            try:
                yield kind.model_validate(row, strict=True)
            except ValidationError as error:
                raise file.fault(f"row {number}", one_line(error)) from None
    except (pa.ArrowException, OSError) as error:
        raise file.fault("", f"not a Parquet file that can be read: {error}") from error
