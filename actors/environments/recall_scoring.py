"""What kind of reply the answer to a recall question is: right, told elsewhere, abstained or made up.

A reply is of one kind at most: the first that fits, in this order. A reply without a word is of none.

    right           it names this question's answer
    told elsewhere  it names what the episode told, though in answer to another question (a leak)
    abstained       it says that it does not know
    made up         all else

A question whose answer nobody told has no right answer: there it is right to abstain.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from actors.environments.scoring import plain_em, plain_f1, says_unknown

UNKNOWN = "I don't know"
"""The gold answer to a question whose answer nobody told."""

UNTOLD = (STRANGER, SAME_PERSON) = ("stranger", "same_person")
"""Categories of such a question: about a person of whom nothing was told, or about a told person."""

KINDS = ("told_elsewhere", "abstained", "made_up")
"""Scores beside f1 and em: 1 where the reply is of that kind, else 0."""

_NOT = r"(?: not|n'?t| never)"
_UNSURE = re.compile(
    r"\b(?:dunno|idk|unsure|no idea|no (?:such )?(?:memory|record|recollection|knowledge)"
    rf"|(?:do|does|did|could|can|would){_NOT} (?:really |actually |yet )?"
    r"(?:know|say|tell|recall|remember|mention|state|specify|answer)"
    r"|(?:cannot|can'?t) (?:say|tell|recall|remember|answer)"
    r"|not (?:sure|certain|aware|familiar)|unable to (?:say|tell|answer|recall)"
    r"|do(?: not|n'?t) have (?:any |enough |that |this |the |access|information|specific |personal )"
    rf"|(?:have|has|had|was|were|am|been){_NOT}(?: been)? (?:told|mentioned|given|informed|said)"
    r"|(?:never|nobody|no one|no-one) (?:has )?(?:told|said|mentioned|knows|knew))\b"
)


def abstains(reply: str) -> bool:
    """Whether the reply says, in any usual wording, that it does not know."""
    text = " ".join(reply.lower().replace("\u2019", "'").split())
    return says_unknown(text) or _UNSURE.search(text) is not None


def recall_scores(reply: str, answer: str | None, told: Collection[str]) -> dict[str, float]:
    """The scores of a reply. ``answer`` is None where nobody told it; ``told``: all that the episode told."""
    kind = _kind(reply, answer, told)
    scores = {
        "f1": float(kind == "abstained") if answer is None else plain_f1(reply, answer),
        "em": float(kind == "abstained") if answer is None else plain_em(reply, answer),
    }
    return scores | {name: float(kind == name) for name in KINDS}


def _kind(reply: str, answer: str | None, told: Collection[str]) -> str:
    words = _words(reply)
    if not words:
        return "empty"
    if answer is not None and _words(answer) <= words:
        return "right"
    if any(_words(other) <= words for other in told):
        return "told_elsewhere"
    return "abstained" if abstains(reply) else "made_up"


def _words(text: str) -> set[str]:
    """Lowered words. As for f1, an apostrophe or a hyphen joins; beyond it, "7th" is "7"."""
    words = re.findall(r"[^\W_]+", re.sub("['\u2019-]", "", text.lower()))
    return {re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word) for word in words}
