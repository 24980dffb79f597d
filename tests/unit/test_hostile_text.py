"""What a model, a judge or a data file says is read in a time by its length, not by its square."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from actors.environments.beam import _found
from actors.environments.judge.judge import judge_prompt, parse_verdict
from actors.environments.recall_questions import abstains, recall_scores, subject_of
from actors.environments.rubric_rules import parse_rule
from actors.environments.scoring import mem1_f1, official_f1, plain_f1
from actors.environments.search import _first_tag
from actors.memory.note_text import parse_attributes, parse_mentions
from actors.memory.paging_tools import parse_call
from actors.text.flashcards import is_told, parse_flashcards
from actors.text.nearly_json import objects
from actors.text.split_text import split_text
from actors.text.thoughts import visible_reply
from actors.text.tools import calls_in
from cluster.common.failures import alike, one_cause
from cluster.common.printable import visible
from cluster.tracking.sender import first_line

LENGTH = 10_000  # a square of it is most of a second
ASKED = judge_prompt("Where?", "Oslo", ("It names a town.", "It is short."))
READERS: dict[str, Callable[[str], object]] = {
    "flashcards": lambda text: parse_flashcards(text, 64),
    "nearly JSON": lambda text: list(objects(text)),
    "thoughts": visible_reply,
    "tool calls": lambda text: calls_in(text, ("price",)),
    "grounded": lambda text: is_told("a town", text),
    "split": lambda text: split_text(text, len, 500),
    "notes": parse_attributes,
    "mentions": parse_mentions,
    "paging": parse_call,
    "rule": parse_rule,
    "abstains": abstains,
    "recall": lambda text: recall_scores(text, "Oslo", ("Oslo", "Rome")),
    "subject": subject_of,
    "F1": lambda text: plain_f1(text, "Oslo"),
    "LoCoMo": lambda text: official_f1(text, "Oslo, Rome", 1),
    "MEM1": lambda text: mem1_f1(text, "Oslo"),
    "verdict": lambda text: parse_verdict(text, ASKED),
    "BEAM": lambda text: list(_found({"role": "user", "content": text})),
    "search": _first_tag,
    "failures": lambda text: one_cause([alike(text)]),
    "MLflow's error": lambda text: first_line(ValueError(text)),
    "terminal": visible,
}
PIECES = (
    *(" ", "\n", "a", "a ", "1", "1,", "[", "{", "(", '"', "\\", "<", ":", "a:", "- ", "```", "\u0301"),
    *('{"', '["', '{"a":', '[{"instruction": "a", ', '{"call": ', '"id": ', '{"met": true, ', "'a': "),
    *("<think>", "<tool_call>", "<search>", "<answer>", "price", "[CALL_ID] ", "->->", "do not ", "Aa "),
    *("contains ", "at most ", "(Caused by a(", "(a:1", "a: task "),
)
STARTS = ("", "price", "contains", '[{"instruction": "')


def _seconds(read: Callable[[str], object], text: str) -> float:
    began = time.process_time()  # of this process alone: the machine may be busy
    with suppress(ValueError):  # a refusal
        read(text)
    return time.process_time() - began


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", READERS)
def test_a_long_text_takes_time_by_its_length(name: str) -> None:
    read = READERS[name]
    _seconds(read, "a")  # what it imports takes seconds
    for start in STARTS:
        for piece in PIECES:
            whole, half = (f"{start}{piece * (length // len(piece))}!" for length in (LENGTH, LENGTH // 2))
            if (seconds := _seconds(read, whole)) > 0.2:
                # twice the text: twice the time, where a square makes it four times
                assert seconds < 3 * _seconds(read, half), (start, piece, seconds)
