"""Splits a text at its natural breaks into pieces that fit a limit."""

from __future__ import annotations

import re
from collections.abc import Callable

# After a line break, else after a sentence, else after white space.
_BREAKS = (re.compile(r"(?<=\n)"), re.compile(r"(?<=[.!?]\s)"), re.compile(r"(?<=\s)"))


def split_text(text: str, measure: Callable[[str], int], limit: int) -> list[str]:
    """Pieces that join to ``text``, each at most ``limit`` by ``measure``. One character may exceed it.

    ``measure`` may count a fixed part with every text, such as the tokens around a chat turn.
    """
    if len(text) <= 1 or measure(text) <= limit:
        return [text]
    parts: list[str] = []
    for pattern in _BREAKS:
        parts = [part for part in pattern.split(text) if part]
        if len(parts) > 1:
            break
    else:
        parts = [text[: len(text) // 2], text[len(text) // 2 :]]
    frame = measure("")  # what every piece costs, so it must not be counted again for each part
    packs: list[str] = []
    room = -1
    for part in parts:
        size = measure(part) - frame
        if room < size:
            packs.append("")
            room = limit - frame
        packs[-1] += part
        room -= size
    # Tokens of parts need not add up to the tokens of the whole. Then all parts seem to fit into one pack:
    # halve it, or the recursion would not end.
    if len(packs) == 1:
        packs = ["".join(parts[: len(parts) // 2]), "".join(parts[len(parts) // 2 :])]
    return [piece for pack in packs for piece in split_text(pack, measure, limit)]
