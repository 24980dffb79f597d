"""Tells whether an answer is made of words that were told: no card may answer what nobody said."""

from __future__ import annotations

import re


def is_told(answer: str, told: str) -> bool:
    """Whether all words of ``answer`` are among those of ``told``.

    Chinese, Japanese or Thai puts no blanks between words, so there a word may stand within a longer run.
    """
    words = set(_words(told))
    return all(word in words or (not word.isascii() and word in told.casefold()) for word in _words(answer))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
