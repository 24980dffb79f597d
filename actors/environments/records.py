"""Tasks from a user's own records: texts to read, then one question.

A record is a line of JSON Lines, or a row of a Parquet file. The names of its fields are configured, and
other shapes are known (record_fields.py).

    {"texts": ["Nora moved to Lisbon.", "Omar bakes."],
     "question": "Where does Nora live?",
     "answer": ["Lisbon", "in Lisbon"]}

The reward is the token F1 against the best of the right answers. Where the texts do not tell the answer, one
that says so is right (`scoring.says_unknown`), and the system prompt gives the words for it. Records with the
same texts are on the same side of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from actors.environments.base import ReadThenAsk, Split, held_out, passes, task_seed
from actors.environments.data_file import PARQUET, DataFile, Text, TextOrNumber, Texts, TextsOrNumbers
from actors.environments.record_fields import columns_of, found_in
from actors.environments.scoring import plain_em, plain_f1, says_unknown
from actors.protocols import TaskError
from actors.types import Answer, Outcome, Task
from configs.files import one_line
from configs.schema import RecordsConfig

SYSTEM_PROMPT = "Remember what you read. Answer the question in a few words."
_UNKNOWN = 'If the texts do not tell, answer "Not mentioned".'
_NO_CATEGORY = "records"
_NO_TEXT = "none"  # for pydantic, which wants a text


@dataclass(frozen=True, slots=True)
class Record:
    """One record. ``answers`` is empty where the texts do not tell the answer."""

    texts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    category: str

    @property
    def key(self) -> str:
        """Decides the side of the split."""
        return hashlib.sha256("\0".join(self.texts or (self.question,)).encode()).hexdigest()


class RecordsEnvironment:
    """The `records` task source."""

    name = "records"
    prompt = SYSTEM_PROMPT
    needs_texts = True

    def __init__(self, config: RecordsConfig) -> None:
        """Raises TaskError when the file is malformed or nothing can be held out."""
        records = read_records(config, self.name, self.needs_texts)
        all_told = all(record.answers for record in records)
        self.system_prompt = self.prompt if all_told else f"{self.prompt} {_UNKNOWN}"
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
                f"{self.name}-{split}-{seed}-{position}", self.name, payload, task_seed(split, seed, position)
            )

    def start(self, task: Task) -> RecordSession:
        return RecordSession(task)


class RecordSession(ReadThenAsk):
    """One episode: the texts in order, then the question."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.payload["texts"], [task.payload["question"]])
        self._task = task

    def outcome(self) -> Outcome:
        (prediction,) = self.answers
        answer = scored_answer(self._task, prediction)
        return Outcome(reward=answer.scores["f1"], reward_parts=dict(answer.scores), answers=(answer,))


def scored_answer(task: Task, prediction: str) -> Answer:
    """The answer to a record's question, with "f1" and "em" against the best of the right ones."""
    right_answers = tuple(task.payload["answers"])
    if right_answers:
        scores = {
            "f1": max(plain_f1(prediction, right) for right in right_answers),
            "em": max(plain_em(prediction, right) for right in right_answers),
        }
    else:
        scores = dict.fromkeys(("f1", "em"), float(says_unknown(prediction)))
    gold = right_answers or ("Not mentioned",)
    return Answer(task.payload["question"], gold, prediction, task.payload["category"], scores)


def read_records(
    config: RecordsConfig, environment: str = "records", needs_texts: bool = True
) -> list[Record]:
    """All records, in the file's order: at least one. Raises TaskError."""
    setting = f"environment.{environment}.path"
    file = DataFile(config.path, setting, "a file of records (.jsonl, .json or .parquet)")
    rows: Iterator[tuple[str, dict[str, Any]]] = file.named_lines(dict[str, Any])
    if config.path.endswith(".parquet") or file.head().startswith(PARQUET):
        rows = ((f"row {number}", row) for number, row in enumerate(_rows(file, columns_of(config))))
    records = [_record(file, name, row, config, needs_texts) for name, row in rows]
    if not records:
        raise file.empty("records")
    return records


class _Fields(BaseModel):
    texts: Texts
    question: Text
    answers: TextsOrNumbers | None
    category: TextOrNumber = _NO_CATEGORY


def _record(
    file: DataFile, name: str, row: dict[str, Any], config: RecordsConfig, needs_texts: bool
) -> Record:
    values, names = found_in(row, config)
    has_texts = needs_texts or bool(values.get("texts"))
    if not has_texts:
        values["texts"] = [_NO_TEXT]
    try:
        fields = _Fields.model_validate(values, strict=True)
    except ValidationError as error:
        fault = one_line(error)
        field = fault.partition(":")[0].partition(".")[0]
        raise file.fault(name, fault.replace(field, names[field], 1)) from None
    answers = dict.fromkeys(fields.answers or ())
    return Record(tuple(fields.texts) if has_texts else (), fields.question, tuple(answers), fields.category)


def _rows(file: DataFile, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, batch by batch, with the ``wanted`` columns that it has."""
    import pyarrow as pa
    from pyarrow import parquet

    file.head()  # says why a file cannot be read
    try:
        table = parquet.ParquetFile(Path(file.path))
        columns = [name for name in table.schema_arrow.names if name in wanted]
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise file.fault("", f"not a Parquet file that can be read: {error}") from error
