"""The visible reply: what parser, scorers, judge, memories and chat take for said."""

from __future__ import annotations

import pytest

from actors.environments.base import ReadThenAsk
from actors.text.thoughts import end_of_thought, visible_reply
from actors.types import Outcome


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Oslo", "Oslo"),
        (" Oslo\n", " Oslo\n"),  # nothing was thought: the text is as it was sampled
        ("<think>\nNorway?\n</think>\n\nOslo", "Oslo"),
        ("Norway? I think.\n</think>\n\nOslo", "Oslo"),  # the prompt had opened the thought
        ("<think>Norway? It could", ""),
        ("<think></think>", ""),
        ("<think>a</think>Os<think>b</think>lo", "Oslo"),
        ("<think>a</think>b</think>Oslo", "Oslo"),
        ("<think>a <think>b</think>Oslo", "Oslo"),
        ("Oslo\n<think>or Bergen", "Oslo"),
        ("<THINK>a</Think>Oslo", "Oslo"),
        ("<thinking>a</thinking>Oslo", "Oslo"),
        ("[THINK]a[/THINK]Oslo", "Oslo"),
        ("I think </b> so", "I think </b> so"),
        ("The <think> tag opens a thought.", "The <think> tag opens a thought."),
        ("Oslo\n  <think>or", "Oslo"),
    ],
)
def test_what_a_reply_says(text: str, said: str) -> None:
    assert visible_reply(text) == said
    assert visible_reply(said) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [("Norway?</think>Oslo", "Oslo"), ("Norway?", ""), ("", ""), ("<think>Norway?</think>Oslo", "Oslo")],
)
def test_what_a_reply_says_that_begins_in_a_thought(text: str, said: str) -> None:
    assert visible_reply(text, in_thought=True) == said


@pytest.mark.parametrize(
    ("prompt", "end"),
    [
        ("assistant\n", ""),
        ("assistant\n<think>\n", "\n</think>\n\n"),
        ("assistant<think>", "\n\n</think>\n\n"),
        ("[/INST][THINK]", "\n\n[/THINK]\n\n"),
        ("assistant\n<think>\n\n</think>\n\n", ""),
    ],
)
def test_a_prompts_open_thought_can_be_ended(prompt: str, end: str) -> None:
    assert end_of_thought(prompt) == end
    assert (
        visible_reply(f"{prompt}{end}Oslo".removeprefix("assistant").removeprefix("[/INST]")).strip()
        == "Oslo"
    )


class _Quiz(ReadThenAsk):
    def outcome(self) -> Outcome:
        return Outcome(0.0, {}, ())


def test_a_session_keeps_what_was_said() -> None:
    session = _Quiz([], ["Capital?", "River?"])
    session.act("<think>Bergen?</think>\n\nOslo")
    assert session.answers == ["Oslo", ""]
