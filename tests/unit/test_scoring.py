"""The scorers against values worked out by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environments.scoring import mem1_em, mem1_f1, official_f1, plain_em, plain_f1, says_not_mentioned


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


# LoCoMo's public evaluation (task_eval/evaluation.py), rule by rule.
# An accent may be a letter of its own: e + U+0301.
@pytest.mark.parametrize(
    ("prediction", "gold", "category", "score"),
    [
        # nothing to compare
        ("", "", 4, 0.0),
        (" \t\n", "Paris", 4, 0.0),
        ("...?!", "...?!", 4, 0.0),
        ("the", "the", 4, 0.0),
        ("The, and... a!", "Paris", 2, 0.0),
        # lowered; punctuation is dropped and not replaced by a space; only ASCII's
        ("PARIS", "paris", 4, 1.0),
        ("Anna's", "annas", 4, 1.0),
        ("well-known", "wellknown", 4, 1.0),
        ("well-known", "well known", 4, 0.0),
        ("snake_case", "snakecase", 4, 1.0),
        ("$5.50 (net)", "550 net", 4, 1.0),
        ("“Paris”", "Paris", 4, 0.0),
        ("Paris…", "Paris", 4, 0.0),
        # articles and "and" go as whole words, and after the punctuation
        ("a cat and the dog", "cat dog", 4, 1.0),
        ("theater", "ater", 4, 0.0),
        ("A. and B.", "b", 4, 1.0),
        ("and/or", "or", 4, 0.0),
        ("vitamin A", "vitamin", 4, 1.0),
        # unicode
        ("Zürich", "zürich", 4, 1.0),
        ("ZÜRICH", "zürich", 4, 1.0),
        ("naïve", "naive", 4, 0.0),
        ("e\u0301", "\u00e9", 4, 0.0),
        ("voila a\u0300 bord", "voila bord", 4, 0.8),
        ("a\u0301", "\u0301", 4, 0.0),
        ("m\u00b2", "a\u00b2 m\u00b2", 4, 2 / 3),
        ("東京", "東京", 4, 1.0),
        ("10\u00a0May", "10 May", 4, 1.0),
        # numbers are words like others
        ("1,000", "1000", 4, 1.0),
        ("3.5", "35", 4, 1.0),
        ("2", "two", 4, 0.0),
        ("7 May 2023", "May 7, 2023", 2, 1.0),
        ("2023-05-07", "7 May 2023", 2, 0.0),
        ("in 2022", "2022", 2, 2 / 3),
        # Porter's stems
        ("She was painting landscapes", "paint landscape", 4, 2 / 3),
        ("happily", "happy", 4, 0.0),
        ("cats cats", "cat", 4, 2 / 3),
        # category 1: both sides are split at commas; the mean over the gold's parts of the best guess
        ("pottery, camping", "pottery, camping, painting", 1, 2 / 3),
        ("painting, camping, pottery", "pottery", 1, 1.0),
        ("pottery and camping", "pottery, camping", 1, 2 / 3),
        ("pottery; camping", "pottery, camping", 1, 2 / 3),
        ("pottery,, camping,", "pottery, camping", 1, 1.0),
        ("pottery, camping", "pottery,, camping", 1, 2 / 3),
        ("the, pottery", "the, pottery", 1, 0.5),
        ("7 May, 2023", "7 May, 2023", 1, 1.0),
        (",", "pottery", 1, 0.0),
        ("pottery", ",", 1, 0.0),
        # category 3: the gold ends at its first semicolon, the prediction does not
        ("Yes", "Yes; because she said so; twice", 3, 1.0),
        ("Yes; because she said so", "Yes", 3, 1 / 3),
        ("Yes", "; yes", 3, 0.0),
        ("likely no, she is away", "likely no, she is away", 3, 1.0),
        # category 5: two phrases anywhere, in any case, and nothing else
        ("NOT MENTIONED", "", 5, 1.0),
        ("That is not mentioned in the conversation.", "pottery", 5, 1.0),
        ("There is no information available on that", "", 5, 1.0),
        ("It is not  mentioned", "", 5, 0.0),
        ("It isn't mentioned", "", 5, 0.0),
        ("I do not know", "", 5, 0.0),
        ("No information", "", 5, 0.0),
        ("not-mentioned", "", 5, 0.0),
        # elsewhere the phrases are words like any
        ("Not mentioned", "pottery", 4, 0.0),
        ("Not mentioned", "not mentioned", 4, 1.0),
    ],
)
def test_official_edges(prediction: str, gold: str, category: int, score: float) -> None:
    assert official_f1(prediction, gold, category) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "em"),
    [
        ("1,000", "1000", 1.0, 1.0),
        ("3.5", "35", 1.0, 1.0),
        ("2", "two", 0.0, 0.0),
        ("GPS-tracker", "GPS tracker", 0.0, 0.0),
        ("cats", "cat", 0.0, 0.0),  # no stemming
        ("Paris, Rome", "Rome, Paris", 1.0, 0.0),  # F1 is blind to the order, EM is not
        ("10\u00a0May", "10 May", 1.0, 1.0),
        ("¿Dónde?", "dónde", 1.0, 1.0),
        ("$5", "5", 1.0, 1.0),  # ASCII's symbols are punctuation
        ("5 €", "5", 2 / 3, 0.0),  # others are not
        ("e\u0301t\u00e9", "\u00e9t\u00e9", 0.0, 0.0),  # nothing is composed
        ("the", "The", 1.0, 1.0),
        ("Not mentioned", "Not mentioned.", 1.0, 1.0),
        ("\u200b", "Paris", 0.0, 0.0),
    ],
)
def test_plain_edges(prediction: str, gold: str, f1: float, em: float) -> None:
    assert plain_f1(prediction, gold) == pytest.approx(f1)
    assert plain_em(prediction, gold) == em


# MEM1's public evaluation (Mem1/inference/eval.py), rule by rule.
@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "em"),
    [
        # punctuation parts words, and only ASCII's is punctuation
        ("Jay Z", "Jay-Z", 1.0, 1.0),
        ("1986 2013", "1986-2013", 1.0, 1.0),
        ("1986 2013", "1986\u20132013", 0.0, 0.0),
        ("Annas", "Anna's", 0.0, 0.0),
        ("1000", "1,000", 0.0, 0.0),
        ("“Paris”", "Paris", 0.0, 0.0),
        (" PARIS!\n", "paris", 1.0, 1.0),
        ("10\u00a0May", "10 May", 1.0, 1.0),
        # sets: what stands twice counts once, the order is EM's alone
        ("New York", "New York, New York", 1.0, 0.0),
        ("a a b", "a b b", 1.0, 0.0),
        ("York New", "New York", 1.0, 0.0),
        # articles stay, accents and scripts too, and nothing is stemmed
        ("the Eiffel Tower", "Eiffel Tower", 0.8, 0.0),
        ("ZÜRICH", "zürich", 1.0, 1.0),
        ("naïve", "naive", 0.0, 0.0),
        ("東京", "東京", 1.0, 1.0),
        ("cats", "cat", 0.0, 0.0),
        # nothing to compare
        ("", "Paris", 0.0, 0.0),
        ("?!...", "Paris", 0.0, 0.0),
        ("Paris", "!!!", 0.0, 0.0),
        ("", "!!!", 0.0, 1.0),
        ("?", "!!!", 0.0, 1.0),
    ],
)
def test_mem1(prediction: str, gold: str, f1: float, em: float) -> None:
    assert mem1_f1(prediction, gold) == pytest.approx(f1)
    assert mem1_em(prediction, gold) == em


def test_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="category=6"):
        official_f1("a", "a", 6)


_WORDS = (
    "cat",
    "cats",
    "the",
    "and",
    "A",
    "Zürich",
    "7",
    "1,000",
    ",",
    ";",
    "...",
    "not mentioned",
    "a\u0301",
    "東京",
)
_ANSWERS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(_WORDS), max_size=8).map(" ".join))


@settings(max_examples=200, deadline=None)
@given(_ANSWERS, _ANSWERS, st.integers(1, 5))
def test_every_score_is_between_0_and_1(prediction: str, gold: str, category: int) -> None:
    found = [score(prediction, gold) for score in (plain_f1, plain_em, mem1_f1, mem1_em)]
    for score in (*found, official_f1(prediction, gold, category)):
        assert 0.0 <= score <= 1.0 + 1e-12


@settings(max_examples=200, deadline=None)
@given(_ANSWERS, _ANSWERS)
def test_overlap_is_symmetric_where_no_side_is_cut(one: str, other: str) -> None:
    assert plain_f1(one, other) == pytest.approx(plain_f1(other, one))
    assert plain_em(one, other) == plain_em(other, one)
    assert (mem1_f1(one, other), mem1_em(one, other)) == (
        pytest.approx(mem1_f1(other, one)),
        mem1_em(other, one),
    )
    for category in (2, 4):
        assert official_f1(one, other, category) == pytest.approx(official_f1(other, one, category))


@settings(max_examples=200, deadline=None)
@given(_ANSWERS, _ANSWERS)
def test_an_exact_match_has_full_f1(prediction: str, gold: str) -> None:
    assert plain_f1(prediction, gold) == pytest.approx(1.0) or plain_em(prediction, gold) == 0.0


@settings(max_examples=200, deadline=None)
@given(_ANSWERS)
def test_an_answer_equal_to_the_gold_scores_1_unless_nothing_is_left_of_it(text: str) -> None:
    assert plain_f1(text, text) == pytest.approx(plain_em(text, text))
    assert (plain_em(text, text) == 1.0) == (plain_f1(text, f"{text} x") > 0.0)
    for category in (2, 4):
        assert official_f1(text, text, category) in (0.0, pytest.approx(1.0))
        assert official_f1(f"{text} cat", f"{text} cat", category) == pytest.approx(1.0)


@settings(max_examples=100, deadline=None)
@given(_ANSWERS, _ANSWERS)
def test_the_official_categories_differ_only_in_what_they_cut(prediction: str, gold: str) -> None:
    whole = official_f1(prediction, gold, 4)
    assert official_f1(prediction, gold, 2) == whole
    if ";" not in gold:
        assert official_f1(prediction, gold, 3) == whole
    if "," not in gold + prediction:
        assert official_f1(prediction, gold, 1) == whole


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["cat", "red dog", "Zürich", "7 May", "swimming"]), min_size=1, unique=True),
    st.randoms(),
)
def test_category_1_takes_the_parts_in_any_order(parts: list[str], rng: random.Random) -> None:
    shuffled = rng.sample(parts, len(parts))
    assert official_f1(", ".join(shuffled), ", ".join(parts), 1) == pytest.approx(1.0)
    assert official_f1(", ".join(shuffled[:1]), ", ".join(parts), 1) == pytest.approx(1 / len(parts))


def test_says_not_mentioned() -> None:
    assert says_not_mentioned("NOT MENTIONED") and not says_not_mentioned("mentioned")
