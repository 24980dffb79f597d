"""Token F1 and exact match of short answers, as pure functions. Every score is in 0..1.

plain       TMEM's rules (arXiv 2606.04536)
official    LoCoMo's public evaluation (arXiv 2402.17753)
mem1        MEM1's public evaluation (arXiv 2506.15841)

Where a prediction or a right answer has no token the score is 0, except in MEM1's exact match.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cache

import regex

from actors.types import Answer, Outcome

MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP, ADVERSARIAL = 1, 2, 3, 4, 5
CATEGORY_NAMES = {
    MULTI_HOP: "multi-hop",
    TEMPORAL: "temporal",
    OPEN_DOMAIN: "open-domain",
    SINGLE_HOP: "single-hop",
    ADVERSARIAL: "adversarial",
}
_ASCII_PUNCTUATION = frozenset(string.punctuation)
# Not re: there a word ends before a combining mark, so a decomposed "à" would be an article.
_FILLER_WORDS = regex.compile(r"\b(?:a|an|the|and)\b")
_NOT_MENTIONED = ("no information available", "not mentioned")
_UNKNOWN = re.compile(
    r"\b(?:unknown|(?:no|insufficient|not enough) information|not (?:known|stated|specified|provided)"
    r"|never mentioned|(?:do|does|did)(?: not|n't) (?:know|say|tell|mention|state|specify)"
    r"|(?:can ?not|can't) be determined)\b|n't enough information\b"
)


def scored(answers: Sequence[Answer]) -> Outcome:
    """The mean of each score over the ``answers``; the reward is F1."""
    parts = {
        name: sum(answer.scores[name] for answer in answers) / len(answers) for name in answers[0].scores
    }
    return Outcome(reward=parts["f1"], reward_parts=parts, answers=tuple(answers))


def plain_f1(prediction: str, gold: str) -> float:
    """Token F1 after lowering and stripping punctuation (unicode's too)."""
    return _overlap_f1(_plain_tokens(prediction), _plain_tokens(gold))


def plain_em(prediction: str, gold: str) -> float:
    """1.0 when both are the same and not empty, after lowering and stripping punctuation."""
    tokens = _plain_tokens(gold)
    return float(bool(tokens) and _plain_tokens(prediction) == tokens)


def official_f1(prediction: str, gold: str, category: int) -> float:
    """LoCoMo's score of one answer. In category 5 "not mentioned" is right, and ``gold`` is ignored.

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
    """MEM1's score of one answer: F1 over sets, so that a repeated word counts once."""
    return _overlap_f1(set(_mem1_tokens(prediction)), set(_mem1_tokens(gold)))


def mem1_em(prediction: str, gold: str) -> float:
    """MEM1's exact match: 1.0 when the tokens are the same, also when both have none ("!!!" and "")."""
    return float(_mem1_tokens(prediction) == _mem1_tokens(gold))


def says_not_mentioned(prediction: str) -> bool:
    """True when the answer says, in one of LoCoMo's two phrases, that the conversation does not tell."""
    lowered = prediction.lower()
    return any(phrase in lowered for phrase in _NOT_MENTIONED)


def says_unknown(prediction: str) -> bool:
    """True when the answer says, in LoCoMo's phrases or other usual ones, that it cannot be known.

    It stands for LongMemEval's LLM judge (arXiv 2410.10813), which accepts any wording of "unanswerable".
    """
    return (
        says_not_mentioned(prediction)
        or _UNKNOWN.search(prediction.lower().replace("\u2019", "'")) is not None
    )


def _plain_tokens(text: str) -> list[str]:
    return "".join(map(_plain_character, text.lower())).split()


def _plain_character(char: str) -> str:
    # A long dash separates words ("Paris—Rome"). A hyphen joins them ("well-known") and is dropped.
    if char in "\u2013\u2014":
        return " "
    is_punctuation = char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")
    return "" if is_punctuation else char


def _official_tokens(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char not in _ASCII_PUNCTUATION)
    stem = _stemmer()
    return [stem(word) for word in _FILLER_WORDS.sub(" ", kept).split()]


def _mem1_tokens(text: str) -> list[str]:
    # ASCII punctuation separates words: "Jay-Z" is "jay z". Articles stay.
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
    # The import takes a quarter of a second, and only conversations need it.
    from nltk.stem import PorterStemmer

    stem: Callable[[str], str] = PorterStemmer().stem
    return stem
