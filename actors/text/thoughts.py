"""Tells what of a reply is said, and what is only thought. It is the one notion of the visible reply.

    "<think>\\nCapital?\\n</think>\\n\\nOslo"      -> "Oslo"      a closed thought
    "Capital?\\n</think>\\n\\nOslo"               -> "Oslo"      the generation prompt opened it
    "<think>\\nCapital? It could be"             -> ""          cut inside the thought: nothing was said

The flashcard parser, the scorers, the judge, the memories, chat and serve all use it.
"""

from __future__ import annotations

import re

# Qwen3 and the R1 distills write <think>, some others <thinking>; Mistral's Magistral [THINK].
_OPEN = r"(?:<think(?:ing)?>|\[THINK\])"
_CLOSE = r"(?:</think(?:ing)?>|\[/THINK\])"
_MARK = re.compile(f"(?P<open>{_OPEN})|{_CLOSE}", re.IGNORECASE)


def visible_reply(text: str, in_thought: bool = False) -> str:
    """``text`` without its thoughts, stripped. "" where a thought does not end.

    ``in_thought``: the generation prompt has opened a thought, so ``text`` begins inside it.
    """
    said: list[str] = []
    thinking, place = in_thought, 0
    for mark in _MARK.finditer(text):
        if mark["open"]:
            if not thinking:
                said.append(text[place : mark.start()])
            thinking = True
        elif thinking:
            thinking = False
        else:
            # An orphan: all before it was thought, in a thought that the prompt had opened.
            said.clear()
        place = mark.end()
    if not thinking:
        said.append(text[place:])
    return "".join(said).strip()


def opens_thought(text: str) -> bool:
    """True when ``text``, such as a generation prompt, ends inside a thought."""
    *_, last = [None, *_MARK.finditer(text)]
    return last is not None and last["open"] is not None


def is_thought_mark(token: str) -> bool:
    """True for a token that opens or closes a thought."""
    return _MARK.fullmatch(token) is not None
