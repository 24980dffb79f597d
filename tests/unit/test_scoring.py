"""The two scorers against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.scoring import official_f1, plain_em, plain_f1, says_not_mentioned


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "em"),
    [
        ("Paris", "paris.", 1.0, 1.0),
        ("She lives in Paris", "Paris", 0.4, 0.0),
        ("7 May, 2023", "7 May 2023", 1.0, 1.0),
        ("the cat", "cat", 2 / 3, 0.0),  # the plain scorer keeps articles
        ("a a b", "a b b", 2 / 3, 0.0),  # counted with multiplicity
        ("“Zürich”", "zürich", 1.0, 1.0),  # unicode quotes are punctuation, letters are not
        ("naïve", "naive", 0.0, 0.0),
        ("東京", "東京", 1.0, 1.0),
        ("Paris—Rome", "Paris Rome", 1.0, 1.0),
        ("well-known", "wellknown", 1.0, 1.0),
        ("", "Paris", 0.0, 0.0),
        ("?!...", "Paris", 0.0, 0.0),
        ("", "", 0.0, 0.0),
        ("", "...", 0.0, 0.0),
    ],
)
def test_plain(prediction: str, gold: str, f1: float, em: float) -> None:
    assert plain_f1(prediction, gold) == pytest.approx(f1)
    assert plain_em(prediction, gold) == em


@pytest.mark.parametrize(
    ("prediction", "gold", "category", "score"),
    [
        ("The cats and the dog", "a cat, dog", 4, 1.0),  # commas, articles and "and" go, plurals are stemmed
        ("running shoes", "run shoe", 2, 1.0),
        ("", "Paris", 4, 0.0),
        ("!!!", "Paris", 4, 0.0),
        ("the and a", "the", 4, 0.0),  # nothing left on either side
        ("Paris, 2022", "2022", 2, 2 / 3),
        ("painting", "pottery, painting", 1, 0.5),  # category 1: the mean over gold parts of the best guess
        ("pottery, painting", "painting, pottery", 1, 1.0),
        ("pottery painting", "painting, pottery", 1, 2 / 3),
        ("", "painting, pottery", 1, 0.0),
        ("yes", "Yes; she said that she would", 3, 1.0),  # category 3: the gold up to the first semicolon
        ("yes", "Yes; she said that she would", 4, 2 / 7),
        ("It was Not mentioned in the talk", "self-care", 5, 1.0),
        ("No information available.", "", 5, 1.0),
        ("self-care", "self-care", 5, 0.0),
        ("", "", 5, 0.0),
    ],
)
def test_official(prediction: str, gold: str, category: int, score: float) -> None:
    assert official_f1(prediction, gold, category) == pytest.approx(score)


def test_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="category=6"):
        official_f1("a", "a", 6)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(), st.integers(1, 5))
def test_every_score_is_between_0_and_1(prediction: str, gold: str, category: int) -> None:
    for score in (plain_f1(prediction, gold), plain_em(prediction, gold), official_f1(prediction, gold, category)):
        assert 0.0 <= score <= 1.0 + 1e-12


@settings(deadline=None)
@given(st.text(alphabet="abc ,.;THE", min_size=1))
def test_an_exact_match_has_full_f1(text: str) -> None:
    assert plain_f1(text, text) == pytest.approx(plain_em(text, text))


def test_says_not_mentioned() -> None:
    assert says_not_mentioned("NOT MENTIONED") and not says_not_mentioned("mentioned")
