"""Decides a rubric by a rule, without a language model. The rubric's text is a rule of this grammar.

    contains: TEXT                contains any of: TEXT | TEXT | ...      starts with: TEXT
    not contains: TEXT            equals: TEXT                            ends with: TEXT
    at most N UNIT                at least N UNIT                         exactly N UNIT
    matches: REGEX                not matches: REGEX                      valid JSON

UNIT is words, lines or characters. The grammar is our own; CL-Bench's rubrics are prose.

Texts are compared without case, and any white space counts as one space. The answer's ends are trimmed. A
regular expression is searched in the answer as it is, with case; ``(?i)`` at its front turns case off. The
``regex`` library runs it with a time limit: files come from outside, and ``(a|aa)+$`` may take for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import regex

from actors.environments.judge.cached_endpoint import NO_COST
from actors.environments.judge.judge import Verdict
from actors.protocols import TaskError

Rule = Callable[[str], bool]

GRAMMAR = (
    "contains: TEXT, not contains: TEXT, contains any of: A | B, equals: TEXT, starts with: TEXT, "
    "ends with: TEXT, matches: REGEX, not matches: REGEX, "
    "at most | at least | exactly N words | lines | characters, valid JSON"
)
_REGEX_SECONDS = 1.0
_MAX_PATTERN_CHARACTERS = 1000
_COUNT = re.compile(r"(at most|at least|exactly)\s+(\d{1,7})\s+(word|line|character)s?", re.IGNORECASE)


class RuleError(ValueError):
    """A rubric is no rule, or its rule could not be decided for an answer in time."""


class RuleChecker:
    """The `rules` checker: a Judge for rubrics that are rules."""

    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        """Decide each rubric by its rule. Raises TaskError when a rule takes too long."""
        met = []
        for number, rubric in enumerate(rubrics):
            try:
                met.append(parse_rule(rubric)(answer))
            except RuleError as error:
                raise TaskError(f"rubrics[{number}] {rubric!r} {error}") from None
        return Verdict(met=tuple(met), reasons=tuple("" for _ in rubrics), cost=NO_COST)


@lru_cache(maxsize=4096)
def parse_rule(rubric: str) -> Rule:
    """Read ``rubric`` as a test of an answer. Raises RuleError.

    The test raises RuleError too, when a regular expression takes too long.
    """
    text = rubric.strip()
    if " ".join(text.lower().split()) == "valid json":
        return _is_json
    if (count := _COUNT.fullmatch(text)) is not None:
        return _count_rule(count[1].lower(), int(count[2]), count[3].lower())
    key, colon, said = (part.strip() for part in text.partition(":"))
    build = _KEYED_RULES.get(" ".join(key.lower().split())) if colon else None
    if build is None:
        raise RuleError(f"is no rule; one of: {GRAMMAR}")
    if not said:
        raise RuleError(f"says nothing after {key!r}; one of: {GRAMMAR}")
    return build(said)


def _contains(text: str) -> Rule:
    wanted = _plain(text)
    return lambda answer: wanted in _plain(answer)


def _contains_any(text: str) -> Rule:
    wanted = [_plain(part) for part in text.split("|")]
    if not all(wanted):
        raise RuleError(f"has an empty alternative, which every answer would contain; one of: {GRAMMAR}")
    return lambda answer: any(part in _plain(answer) for part in wanted)


def _equals(text: str) -> Rule:
    wanted = _plain(text)
    return lambda answer: _plain(answer) == wanted


def _starts(text: str) -> Rule:
    wanted = _plain(text)
    return lambda answer: _plain(answer).startswith(wanted)


def _ends(text: str) -> Rule:
    wanted = _plain(text)
    return lambda answer: _plain(answer).endswith(wanted)


def _matches(text: str) -> Rule:
    source = text.strip()
    if len(source) > _MAX_PATTERN_CHARACTERS:
        most = _MAX_PATTERN_CHARACTERS
        raise RuleError(f"has a regular expression of {len(source)} characters, and {most} are the most")
    try:
        pattern = regex.compile(source)
    except (regex.error, RecursionError, OverflowError) as error:
        cause = " ".join(str(error).split())
        raise RuleError(f"has a regular expression that does not compile: {cause}") from None

    def search(answer: str) -> bool:
        try:
            # concurrent: other threads run meanwhile.
            return pattern.search(answer, timeout=_REGEX_SECONDS, concurrent=True) is not None
        except TimeoutError:
            raise RuleError(
                f"has a regular expression that was not done after {_REGEX_SECONDS:g} s on this answer: "
                "write a simpler one"
            ) from None

    return search


def _negated(build: Callable[[str], Rule]) -> Callable[[str], Rule]:
    def build_negated(text: str) -> Rule:
        rule = build(text)
        return lambda answer: not rule(answer)

    return build_negated


_KEYED_RULES: dict[str, Callable[[str], Rule]] = {
    "contains": _contains,
    "not contains": _negated(_contains),
    "contains any of": _contains_any,
    "equals": _equals,
    "starts with": _starts,
    "ends with": _ends,
    "matches": _matches,
    "not matches": _negated(_matches),
}


def _count_rule(bound: str, number: int, unit: str) -> Rule:
    def measure(answer: str) -> int:
        if unit == "word":
            return len(answer.split())
        if unit == "line":
            return sum(bool(line.strip()) for line in answer.splitlines())
        return len(answer.strip())

    if bound == "at most":
        return lambda answer: measure(answer) <= number
    if bound == "at least":
        return lambda answer: measure(answer) >= number
    return lambda answer: measure(answer) == number


def _is_json(answer: str) -> bool:
    try:
        json.loads(answer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # ValueError also for an integer that is too long for Python
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
