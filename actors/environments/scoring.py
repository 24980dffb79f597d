"""Token F1 and exact match of short answers: the plain scorer (paper's), LoCoMo's official one and MEM1's. Pure functions, every score in 0..1.

The official rules are those of LoCoMo's public evaluation (arXiv 2402.17753) and of MEM1's (2506.15841). A side without any token scores 0, but for
MEM1's exact match.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from functools import cache

import regex

MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP, ADVERSARIAL = 1, 2, 3, 4, 5
CATEGORY_NAMES = {
    MULTI_HOP: "multi-hop",
    TEMPORAL: "temporal",
    OPEN_DOMAIN: "open-domain",
    SINGLE_HOP: "single-hop",
    ADVERSARIAL: "adversarial",
}
_ASCII_PUNCTUATION = frozenset(string.punctuation)
_FILLED_WORDS = regex.compile(
    r"\b(?:a|an|the|and)\b"
)  # not re, whose word ends before a combining mark: a decomposed "à" would be an article
_NOT_MENTIONED = ("no information available", "not mentioned")
_UNKNOWN = re.compile(
    r"\b(?:unknown|(?:no|insufficient|not enough) information|not (?:known|stated|specified|provided)|never mentioned"
    r"|(?:do|does|did)(?: not|n't) (?:know|say|tell|mention|state|specify)|(?:can ?not|can't) be determined)\b|n't enough information\b"
)


def plain_f1(prediction: str, gold: str) -> float:
    """Token F1 after lowering and stripping punctuation (unicode's too)."""
    return _overlap_f1(_plain_tokens(prediction), _plain_tokens(gold))


def plain_em(prediction: str, gold: str) -> float:
    """1.0 when both are the same, and not nothing, after lowering and stripping punctuation."""
    tokens = _plain_tokens(gold)
    return float(bool(tokens) and _plain_tokens(prediction) == tokens)


def official_f1(prediction: str, gold: str, category: int) -> float:
    """LoCoMo's score of one answer. ``gold`` is ignored for category 5, where saying that the text does not tell is right.

    Raises ValueError for a category outside 1..5.
    """
    if category == ADVERSARIAL:
        return float(says_not_mentioned(prediction))
    if category == MULTI_HOP:
        parts, guesses = gold.split(","), prediction.split(",")
        return sum(max(_stemmed_f1(guess, part) for guess in guesses) for part in parts) / len(parts)
    if category == OPEN_DOMAIN:
        return _stemmed_f1(prediction, gold.split(";", maxsplit=1)[0])
    if category in (TEMPORAL, SINGLE_HOP):
        return _stemmed_f1(prediction, gold)
    raise ValueError(f"category={category!r} is not allowed: it must be 1, 2, 3, 4 or 5")


def mem1_f1(prediction: str, gold: str) -> float:
    """MEM1's score of one answer: as F1, but a word that stands twice counts once."""
    return _overlap_f1(set(_mem1_tokens(prediction)), set(_mem1_tokens(gold)))


def mem1_em(prediction: str, gold: str) -> float:
    """MEM1's exact match: 1.0 when both are the same in its rules, also when nothing is left of both (gold "!!!", prediction "")."""
    return float(_mem1_tokens(prediction) == _mem1_tokens(gold))


def says_not_mentioned(prediction: str) -> bool:
    """Whether the answer says that the conversation does not tell (LoCoMo's two phrases)."""
    lowered = prediction.lower()
    return any(phrase in lowered for phrase in _NOT_MENTIONED)


def says_unknown(prediction: str) -> bool:
    """Whether the answer says that it cannot be known, in LoCoMo's phrases or the other usual ones.

    Our stand-in for the LLM judge of LongMemEval (arXiv 2410.10813), which takes any wording of "unanswerable".
    """
    return (
        says_not_mentioned(prediction)
        or _UNKNOWN.search(prediction.lower().replace("\u2019", "'")) is not None
    )


def _plain_tokens(text: str) -> list[str]:
    return "".join(
        " " if _is_dash(char) else "" if _is_punctuation(char) else char for char in text.lower()
    ).split()


def _is_punctuation(char: str) -> bool:
    return char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")


def _is_dash(char: str) -> bool:
    # Only the long dashes separate words ("Paris—Rome"); a hyphen joins one ("well-known") and goes like other punctuation.
    return char in "\u2013\u2014"


def _official_tokens(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char not in _ASCII_PUNCTUATION)
    stem = _stemmer()
    return [stem(word) for word in _FILLED_WORDS.sub(" ", kept).split()]


def _mem1_tokens(text: str) -> list[str]:
    # Punctuation, only ASCII's, parts words: "Jay-Z" is "jay z". Articles stay.
    return "".join(" " if char in _ASCII_PUNCTUATION else char for char in text.lower()).split()


def _stemmed_f1(prediction: str, gold: str) -> float:
    return _overlap_f1(_official_tokens(prediction), _official_tokens(gold))


def _overlap_f1(prediction: Collection[str], gold: Collection[str]) -> float:
    shared = sum((Counter(prediction) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


@cache
def _stemmer() -> Callable[[str], str]:
    # Imported late: it takes a quarter of a second, and only conversations need it.
    from nltk.stem import PorterStemmer

    stem: Callable[[str], str] = PorterStemmer().stem
    return stem
