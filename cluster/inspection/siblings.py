"""Kept episodes of one task side by side: siblings of a training step, and the rows of an evaluation.

| question       | gold   | TMEM before   | TMEM after RL | train, step 4 |
| Where is Nora? | Lisbon | I don't know. | Lisbon        | Porto         |
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.common.display import keep_words
from cluster.common.printable import visible
from cluster.inspection.record import EpisodeRecord, FailureRecord, Record
from cluster.inspection.terminal import MARKED, list_cells, mark, number_text

_COLUMN = 26  # characters that an episode should have


def show_siblings(task: str, records: Sequence[Record], console: Console) -> None:
    """Print the episodes as columns, as many beside each other as the terminal has room for."""
    console.print(Text(visible(f"task {task}: {len(records)} kept episodes"), style="bold"))
    at_once = max(1, (console.width - _COLUMN) // _COLUMN)
    for first in range(0, len(records), at_once):
        some = records[first : first + at_once]
        table = Table(box=SIMPLE, pad_edge=False)
        table.add_column("", overflow="fold")
        for record in some:
            table.add_column(Text(visible(_title(record))), overflow="fold")
        for title, cells in _lines(some):
            table.add_row(Text(visible(title)), *cells)
        keep_words(table)
        console.print(table)


def _title(record: Record) -> str:
    origin, number = record.origin, record.episode_id.rpartition(".")[2]
    where = origin.label or f"train, sibling {number}"
    return f"{where}, step {origin.step}"


def _lines(records: Sequence[Record]) -> list[tuple[str, list[Text]]]:
    """(title, a cell of each episode): reward, writes, flashcards, then each question."""
    lines = [
        ("reward", [_reward(record) for record in records]),
        ("writes", [Text(list_cells(record)[5]) for record in records]),
        ("flashcards", [_cards(record) for record in records]),
    ]
    played = [record for record in records if isinstance(record, EpisodeRecord)]
    questions = {
        answer.question: " | ".join(answer.gold) for record in played for answer in record.outcome.answers
    }
    for question, gold in questions.items():
        lines.append((f"{question} ({gold})", [_answer(record, question) for record in records]))
    return lines


def _reward(record: Record) -> Text:
    if isinstance(record, FailureRecord):
        return Text(visible(f"failed at {record.boundary}"), style="red")
    return Text(number_text(record.outcome.reward), style="bold")


def _cards(record: Record) -> Text:
    if isinstance(record, FailureRecord):
        return Text("")
    cards = [card for write in record.writes for card in write.log.flashcards]
    return Text("\n".join(visible(f"{card.question} {card.answer}") for card in cards))


def _answer(record: Record, question: str) -> Text:
    if isinstance(record, EpisodeRecord):
        for answer in record.outcome.answers:
            if answer.question == question:
                return Text(visible(answer.prediction), style=MARKED[mark(answer.scores)])
    return Text("-", style="dim")
