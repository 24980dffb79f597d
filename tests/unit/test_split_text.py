"""Texts are split at natural breaks; the fixed cost of a piece counts once; every measure comes to an end."""

from __future__ import annotations

from actors.text.split_text import split_text


def test_breaks_are_lines_then_sentences_then_words_then_anywhere() -> None:
    assert split_text("one. two\nthree", len, 9) == ["one. two\n", "three"]
    assert split_text("one. two three", len, 10) == ["one. ", "two three"]
    assert split_text("one two three", len, 9) == ["one two ", "three"]
    assert split_text("onetwothree", len, 6) == ["onetw", "othree"]


def test_the_fixed_cost_of_a_piece_counts_once() -> None:
    assert split_text("aaaa bbbb cccc", lambda text: 10 + len(text), 20) == ["aaaa bbbb ", "cccc"]


def test_parts_that_seem_to_cost_nothing_do_not_recurse_for_ever() -> None:
    def measure(text: str) -> int:
        return len(text) if len(text) > 5 else 0

    pieces = split_text("aa bb cc dd ee", measure, 8)
    assert "".join(pieces) == "aa bb cc dd ee" and all(measure(piece) <= 8 for piece in pieces)
