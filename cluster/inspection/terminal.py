"""An episode in words, and the view of it in the terminal.

    record --facts, pieces, write_line, ...--> plain text --> show (here), page.render (HTML)

Both views say the same. The words hold no markup, and each view escapes them: a model's text is untrusted.
The terminal prints them without control characters, since an escape sequence could rewrite the screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from actors.text.thoughts import visible_reply
from cluster.common.display import Fitted, keep_words
from cluster.common.printable import visible
from cluster.inspection.compare import Compared
from cluster.inspection.record import (
    EpisodeRecord,
    FailureRecord,
    Passage,
    Record,
    RecordError,
    SegmentRecord,
    WriteEntry,
    load,
)

Mark = Literal["", "right", "partly", "wrong"]
"""How an answer was scored; "" where it has no score."""
COMPARED_TITLE = "With and without its fast weights (greedy, after the same context)"
COMPARED_COLUMNS = ("context", "in the episode", "with Delta", "with Delta = 0")
_TITLES = {
    "system": "system prompt",
    "user": "told",
    "assistant": "reply (not its own)",
    "text": "what was left of an earlier turn",
    "act": "agent",
    "extract": "agent, to its memory",
}
_STYLES = {
    "system": "dim",
    "user": "",
    "assistant": "dim",
    "text": "dim",
    "extract": "bold magenta",
}
MARKED: Mapping[Mark, str] = {
    "": "bold",
    "right": "bold green",
    "partly": "bold yellow",
    "wrong": "bold red",
}
_STRETCH = 8  # tokens: by chance no context ends with the ones that the next begins with
_HEADING = "bold cyan"
_WIDE = 110  # columns of a terminal that has room for the names of episodes


# --- in words ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A thing that happened: a context opens, a passage is read or said, a write follows, a context ends."""

    kind: Literal["context", "passage", "write", "cleared"]
    title: str
    passage: Passage | None = None
    write: WriteEntry | None = None
    mark: Mark = ""


def mark(scores: Mapping[str, float]) -> Mark:
    """Right, wrong or between, by F1; without one by the mean of what there is."""
    values = (
        [scores["f1"]] if "f1" in scores else [value for value in scores.values() if math.isfinite(value)]
    )
    if not values:
        return ""
    mean = sum(values) / len(values)
    return "right" if mean >= 1 else "wrong" if mean <= 0 else "partly"


def pieces(record: EpisodeRecord) -> Iterator[Piece]:
    """Tell the episode from its beginning to its end, without the answers."""
    answers = list(record.outcome.answers)  # that no reply was found for yet: they come in this order
    yield from _writes(record, -1)
    for number, segment in enumerate(record.segments):
        yield Piece("context", _context_line(number, segment))
        for passage in segment.passages:
            scored: Mark = ""
            said = visible_reply(passage.text).strip()
            if passage.kind == "act" and answers and said == answers[0].prediction.strip():
                scored = mark(answers.pop(0).scores)
            title = f"{_TITLES[passage.kind]} ({passage.tokens} tokens)"
            yield Piece("passage", f"{title}, {scored}" if scored else title, passage, mark=scored)
        yield from _writes(record, number)
        if number < len(record.segments) - 1:
            yield Piece("cleared", _cleared_line(segment, record.segments[number + 1]))


def _writes(record: EpisodeRecord, number: int) -> Iterator[Piece]:
    for write in record.writes:
        if write.after == number:
            yield Piece("write", write_line(write), write=write)


def _context_line(number: int, segment: SegmentRecord) -> str:
    state = (
        f"fast weights of revision {segment.revision}" if segment.revision else "no fast weights (Delta = 0)"
    )
    return f"Context {number + 1} · {len(segment.token_ids)} tokens · {state}"


def _cleared_line(before: SegmentRecord, after: SegmentRecord) -> str:
    """Say whether the context was cleared, or cut to its newest tokens.

    It was cut if the next context has its end directly after the system turn.
    """
    opening = next((passage.end for passage in after.passages if passage.kind == "system"), 0)
    rest = (passage for passage in after.passages if passage.start >= opening and passage.kind != "system")
    first = next(rest, None)
    # A whole turn has its opening tokens in front: the copy may begin anywhere between.
    latest = opening if first is None else first.start + (first.kind == "text")
    old, new = before.token_ids, after.token_ids
    for start in range(opening, latest):
        kept = new[start : start + _STRETCH]
        for place in range(len(old) - _STRETCH + 1):
            # The short comparison comes first: nearly always it decides.
            alike = old[place : place + _STRETCH] == kept
            if alike and old[place:] == new[start : start + len(old) - place]:
                return "context cut: its newest tokens stay"
    return "context cleared"


def write_line(write: WriteEntry) -> str:
    log = write.log
    if log.outcome == "empty":
        return f"Nothing was written: {log.reason}"
    losses = f"loss {number_text(log.loss_before)} -> {number_text(log.loss_after)}"
    if log.preserved:
        used = f"{log.preserved_used} of" if log.preserved_used else "up to"  # older records do not know
        losses += f", {number_text(log.preserved_kl)} nats from {used} {len(log.preserved)} offered replies"
    cost = (
        f"{log.steps} steps, {log.seconds:.2f} s, "
        f"{len(log.examples)} examples of {log.prompt_tokens} + {log.answer_tokens} tokens"
    )
    if log.outcome == "rolled_back":
        return f"Write rolled back: {log.reason} · {losses} · {cost}"
    receipt = {"passed": "receipt passed", "off": "receipts are off", "none": "no receipt"}[write.receipt]
    return f"Write: revision {log.revision} · {losses} · {cost} · {receipt}"


def head_line(record: Record) -> str:
    origin = record.origin
    where = f"step {origin.step}" if origin.source == "train" else f"{origin.label}, after step {origin.step}"
    return f"{origin.run} · {where} · task {record.task_id} · episode {record.episode_id}"


def facts(record: Record) -> list[tuple[str, str]]:
    """List (name, value) of all that holds for the whole episode."""
    origin = record.origin
    common = [
        ("model", origin.model),
        ("policy version", str(record.policy_version)),
        ("memory", origin.memory),
        ("worker", origin.worker),
    ]
    if isinstance(record, FailureRecord):
        return [*common, ("failed at", record.boundary), ("why", record.message)]
    return [(name, value) for name, value in [*common, *_course(record)] if value]


def _course(record: EpisodeRecord) -> list[tuple[str, str]]:
    times, outcome = record.timings, record.outcome
    phases = ("act", "extract", "write", "install", "environment")
    spent = ", ".join(f"{name} {getattr(times, name):.2f}" for name in phases)
    parts = f" ({scores_text(outcome.reward_parts)})" if outcome.reward_parts else ""
    siblings = ", ".join(map(number_text, record.siblings)) if len(record.siblings) > 1 else ""
    reasons = {"done": "when all was answered", "max_turns": "at the most turns allowed"}
    tokens = f"{record.tokens} in {len(record.segments)} contexts, {record.sampled_tokens} of them sampled"
    return [
        ("environment", record.environment),
        ("reward", f"{number_text(outcome.reward)}{parts}"),
        ("siblings' rewards", siblings),
        ("ended", reasons[record.stop_reason]),
        ("tokens", tokens),
        ("seconds", f"{times.total:.2f} ({spent})"),
        ("memory events", ", ".join(f"{name} {count}" for name, count in record.memory_events.items())),
    ]


def unshown(record: EpisodeRecord) -> str:
    """Say what a record cannot show. Why: a context without a sampled token is no part of a trajectory."""
    if record.origin.memory in ("truncation", "raw", "paging", "notes"):
        return (
            "Contexts in which the agent said nothing are not recorded (memory policy "
            f"{record.origin.memory})."
        )
    return ""


def answer_cells(record: EpisodeRecord) -> list[tuple[str, str, str, str, str]]:
    """List (question, answered, gold, category, scores)."""
    return [
        (
            answer.question,
            answer.prediction,
            " | ".join(answer.gold),
            answer.category,
            scores_text(answer.scores),
        )
        for answer in record.outcome.answers
    ]


def compared_cells(compared: Sequence[Compared]) -> list[tuple[str, str, str, str]]:
    """List the cells under ``COMPARED_COLUMNS``."""
    return [(str(row.segment + 1), row.said, row.with_delta, row.without) for row in compared]


def number_text(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def scores_text(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number_text(value)}" for name, value in scores.items())


# --- in the terminal ---------------------------------------------------------------------------------------


def show(record: Record, compared: Sequence[Compared], console: Console) -> None:
    """Print the whole episode."""
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
    console.rule(Text("Answers", style=_HEADING), align="left")
    answers = [
        (question, answered, gold, scores) for question, answered, gold, _, scores in answer_cells(record)
    ]
    marks = [MARKED[mark(answer.scores)] for answer in record.outcome.answers]
    _show_table(("question", "answered", "gold", "scores"), answers, console, marks)
    console.print(Text(f"reward {number_text(record.outcome.reward)}", style="bold"))
    if compared:
        console.rule(Text(COMPARED_TITLE, style=_HEADING), align="left")
        _show_table(COMPARED_COLUMNS, compared_cells(compared), console)


def show_list(run: Path, paths: Sequence[Path], console: Console) -> None:
    """Print a row for each episode that the run kept. A narrow terminal has no room for their names."""
    columns = ("no.", "step", "what", "task", "reward", "F1", "writes", "episode")
    shown = columns if console.width >= _WIDE else columns[:-1]
    title = Text(f"{len(paths)} kept episodes of {run.name}")
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in shown:
        right = name in ("no.", "step", "reward", "F1")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for number, path in enumerate(paths, start=1):
        try:
            cells = [Text(visible(cell)) for cell in list_cells(load(path))]
        except RecordError as error:
            cells = [Text(""), Text(visible(str(error)), style="red"), *(Text("") for _ in columns[3:])]
        table.add_row(str(number), *cells[: len(shown) - 1])
    keep_words(table)
    console.print(Fitted(table))


def list_cells(record: Record) -> tuple[str, ...]:
    """The cells of ``show_list``: step, what, task, reward, F1, writes, episode."""
    step, label = str(record.origin.step), record.origin.label or "train"
    if isinstance(record, FailureRecord):
        return step, f"{label}: failed at {record.boundary}", record.task_id, "", "", "", record.episode_id
    outcomes = [write.log.outcome for write in record.writes]
    writes = "/".join(str(outcomes.count(outcome)) for outcome in ("accepted", "empty", "rolled_back"))
    f1 = [answer.scores["f1"] for answer in record.outcome.answers if "f1" in answer.scores]
    mean = number_text(sum(f1) / len(f1)) if f1 else ""
    reward = number_text(record.outcome.reward)
    return step, label, record.task_id, reward, mean, writes, record.episode_id


def _show_piece(piece: Piece, console: Console) -> None:
    if piece.kind == "context":
        console.rule(Text(piece.title, style=_HEADING), align="left")
    elif piece.kind == "cleared":
        console.print(Text(f"--- {piece.title} ---", style="cyan"))
    elif piece.write is not None:
        _show_write(piece.title, piece.write, console)
    elif piece.passage is not None:
        console.print(Text(piece.title, style="dim"))
        text = visible(piece.passage.text.strip())
        style = MARKED[piece.mark] if piece.passage.kind == "act" else _STYLES[piece.passage.kind]
        console.print(_indented(Text(text, style=style)))


def _show_write(title: str, write: WriteEntry, console: Console) -> None:
    style = {"accepted": "yellow", "empty": "red", "rolled_back": "bold red"}[write.log.outcome]
    console.print(Text(visible(title), style=style))
    for card in write.log.flashcards:
        line = (("Q ", "dim"), visible(card.question), ("  A ", "dim"), visible(card.answer))
        console.print(_indented(Text.assemble(*line)))
    for item in write.unused:
        console.print(_indented(Text(f"not a flashcard: {visible(item)}", style="red")))


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 2))


def _show_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console, marks: Sequence[str] = ()
) -> None:
    """``marks``: the style of the second cell of each row, the answer."""
    table = Table(box=SIMPLE, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for number, row in enumerate(rows):
        cells = [Text(visible(cell)) for cell in row]
        if marks:
            cells[1].stylize(marks[number])
        table.add_row(*cells)
    console.print(table)
