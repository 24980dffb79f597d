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
    """``text`` without its thoughts, stripped; a text that has none as it is. "" in a thought without end.

    ``in_thought``: the generation prompt has opened a thought, so ``text`` begins inside it.
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        return "" if in_thought else text
    last_close = max((mark.start() for mark in marks if not mark["open"]), default=-1)
    said: list[str] = []
    thinking, place = in_thought, 0
    for mark in marks:
        if mark["open"]:
            before = text[place : mark.start()]
            # "The <think> tag opens a thought." speaks of a thought and opens none.
            begins_line = not before.rpartition("\n")[2].strip()
            if thinking or not (begins_line or last_close > mark.start()):
                continue
            said.append(before)
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


def end_of_thought(prompt: str) -> str:
    """The text that ends the thought which a generation prompt has opened; "" where it opens none."""
    *_, last = [None, *_MARK.finditer(prompt)]
    if last is None or not last["open"]:
        return ""
    mark = last[0]
    # Qwen's own empty thought is "<think>\n\n</think>\n\n".
    breaks = "\n" if prompt.endswith("\n") else "\n\n"
    return f"{breaks}{mark[0]}/{mark[1:]}\n\n"


def is_thought_mark(token: str) -> bool:
    """True for a token that opens or closes a thought."""
    return _MARK.fullmatch(token) is not None
