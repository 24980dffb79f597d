"""An episode in the terminal. Model text is printed as text: no markup, no control characters (an escape sequence could rewrite the screen)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.inspection.compare import Compared
from cluster.inspection.record import EpisodeRecord, FailureRecord, Record, RecordError, WriteEntry, load
from cluster.inspection.wording import (
    Piece,
    facts,
    head_line,
    number,
    pieces,
    scores_text,
    unshown,
    write_line,
)

_STYLES = {
    "system": "dim",
    "user": "",
    "assistant": "dim",
    "text": "dim",
    "act": "bold green",
    "extract": "bold magenta",
}


def visible(text: str) -> str:
    """Line breaks and tabs stay; every other control or format character is shown as its code."""
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        else f"\\x{ord(char):02x}"
        for char in text
    )


def show(record: Record, compared: Sequence[Compared], console: Console) -> None:
    console.print(Text(visible(head_line(record)), style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts(record):
        table.add_row(Text(name), Text(visible(value)))
    console.print(table)
    if isinstance(record, FailureRecord):
        return
    for piece in pieces(record):
        _show_piece(piece, console)
    if line := unshown(record):
        console.print(Text(line, style="dim"))
    _show_answers(record, console)
    if compared:
        _show_compared(compared, console)


def _show_piece(piece: Piece, console: Console) -> None:
    if piece.kind == "context":
        console.rule(Text(piece.title, style="bold cyan"), align="left")
    elif piece.kind == "cleared":
        console.print(Text(f"--- {piece.title} ---", style="cyan"))
    elif piece.write is not None:
        _show_write(piece.write, console)
    elif piece.passage is not None:
        tokens = piece.passage.end - piece.passage.start
        console.print(Text(f"{piece.title} ({tokens} tokens)", style="dim"))
        console.print(
            Padding(
                Text(visible(piece.passage.text.strip()), style=_STYLES[piece.passage.kind]), (0, 0, 0, 2)
            )
        )


def _show_write(write: WriteEntry, console: Console) -> None:
    style = {"accepted": "yellow", "empty": "red", "rolled_back": "bold red"}[write.log.outcome]
    console.print(Text(visible(write_line(write)), style=style))
    for card in write.log.flashcards:
        console.print(
            Padding(
                Text.assemble(("Q ", "dim"), visible(card.question), ("  A ", "dim"), visible(card.answer)),
                (0, 0, 0, 2),
            )
        )
    for item in write.unused:
        console.print(Padding(Text(f"not a flashcard: {visible(item)}", style="red"), (0, 0, 0, 2)))


def _show_answers(record: EpisodeRecord, console: Console) -> None:
    console.rule(Text("Answers", style="bold cyan"), align="left")
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("question", "answered", "gold", "scores"):
        table.add_column(name, overflow="fold")
    for answer in record.outcome.answers:
        cells = (
            answer.question,
            answer.prediction,
            " | ".join(answer.gold),
            scores_text(dict(answer.scores)),
        )
        table.add_row(*(Text(visible(cell)) for cell in cells))
    console.print(table)
    console.print(Text(f"reward {number(record.outcome.reward)}", style="bold"))


def _show_compared(compared: Sequence[Compared], console: Console) -> None:
    console.rule(
        Text("With and without its fast weights (greedy, after the same context)", style="bold cyan"),
        align="left",
    )
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("context", "in the episode", "with Delta", "with Delta = 0"):
        table.add_column(name, overflow="fold")
    for one in compared:
        table.add_row(
            str(one.segment + 1), *(Text(visible(text)) for text in (one.said, one.with_delta, one.without))
        )
    console.print(table)


def show_list(run: Path, paths: Sequence[Path], console: Console) -> None:
    table = Table(
        title=Text(f"{len(paths)} kept episodes of {run.name}"),
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for name in ("no.", "step", "what", "task", "reward", "F1", "writes", "episode"):
        table.add_column(
            name, justify="right" if name in ("no.", "step", "reward", "F1") else "left", overflow="fold"
        )
    for place, path in enumerate(paths, start=1):
        try:
            table.add_row(str(place), *(Text(visible(cell)) for cell in _cells(load(path))))
        except RecordError as error:
            table.add_row(str(place), "", Text(visible(str(error)), style="red"), "", "", "", "", "")
    console.print(table)


def _cells(record: Record) -> tuple[str, ...]:
    what = record.origin.label or "train"
    if isinstance(record, FailureRecord):
        return (
            str(record.origin.step),
            f"{what}: failed at {record.boundary}",
            record.task_id,
            "",
            "",
            "",
            record.episode_id,
        )
    writes = "/".join(
        str(sum(write.log.outcome == outcome for write in record.writes))
        for outcome in ("accepted", "empty", "rolled_back")
    )
    f1 = [answer.scores["f1"] for answer in record.outcome.answers if "f1" in answer.scores]
    mean = number(sum(f1) / len(f1)) if f1 else ""
    return (
        str(record.origin.step),
        what,
        record.task_id,
        number(record.outcome.reward),
        mean,
        writes,
        record.episode_id,
    )
