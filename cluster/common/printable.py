"""Text for a terminal: counts in words, and what a model or a file wrote, which must not steer it."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """Show control and format characters as their codes; line breaks and tabs stay.

    Why: an escape sequence could rewrite the screen, set a title, or reach the clipboard.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        else f"\\x{ord(char):02x}"
        for char in text
    )


def plural(count: int, word: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count} {word}{'' if count == 1 else 's'}"
