"""Splits text at its natural breaks into pieces that fit a measure."""

from __future__ import annotations

import re
from collections.abc import Callable

_BREAKS = (re.compile(r"(?<=\n)"), re.compile(r"(?<=[.!?]\s)"), re.compile(r"(?<=\s)"))


def split_text(text: str, measure: Callable[[str], int], limit: int) -> list[str]:
    """Pieces of at most ``limit`` by ``measure`` (a single character may exceed it) that join to ``text``."""
    if len(text) <= 1 or measure(text) <= limit:
        return [text]
    parts: list[str] = []
    for pattern in _BREAKS:
        parts = [part for part in pattern.split(text) if part]
        if len(parts) > 1:
            break
    else:
        parts = [text[: len(text) // 2], text[len(text) // 2 :]]
    frame = measure("")
    packs: list[str] = []
    room = -1
    for part in parts:
        size = measure(part) - frame
        if room < size:
            packs.append("")
            room = limit - frame
        packs[-1] += part
        room -= size
    if len(packs) == 1:  # the parts' sizes do not add up to the whole's: halve, so that the recursion ends
        packs = ["".join(parts[: len(parts) // 2]), "".join(parts[len(parts) // 2 :])]
    return [piece for pack in packs for piece in split_text(pack, measure, limit)]
