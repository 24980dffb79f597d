"""Rules in place of a judge: what they ask, what is none, and their negations."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environments import rubric_rules
from actors.environments.rubric_rules import RuleChecker, RuleError, parse_rule
from actors.protocols import TaskError


@pytest.mark.parametrize(
    ("rubric", "met", "not_met"),
    [
        ("contains: stern gate", ["Close the STERN\n gate."], ["stern", "gate stern", ""]),
        ("Contains: STRASSE", ["in der Straße"], ["Gasse"]),
        ("not contains: ramp", ["gate", ""], ["the Ramp"]),
        ("contains any of: one | two words", ["One.", "two  words"], ["two", ""]),
        ("equals: forty two", [" Forty\ntwo "], ["forty two!"]),
        ("starts with: Yes", ["yes, it is", "\n YES"], ["No, yes", ""]),
        ("ends with: done.", ["it is Done. "], ["done"]),
        (r"matches: ^\d+ mm$", ["116 mm"], ["116 MM", "about 116 mm"]),
        (r"matches: (?im)^total: \d+$", ["so\nTOTAL: 7"], ["the total: 7"]),
        (r"not matches: \bI\b", ["it"], ["so I say"]),
        ("matches: a: b", ["a: b"], ["a b"]),
        ("at most 3 words", ["one two three", ""], ["one two three four"]),
        ("At least 1 word", ["one"], ["", " "]),
        ("exactly 2 lines", ["a\n\nb\n"], ["a", "a\nb\nc"]),
        ("at most 4 characters", [" 1234 "], ["12345"]),
        (
            "valid JSON",
            ['{"a": [1, null]}', "7", ' "x" '],
            ["", "{a: 1}", "NaN", "[1] [2]", "[" * 100_000, "1" * 5000],
        ),
    ],
)
def test_rules(rubric: str, met: list[str], not_met: list[str]) -> None:
    rule = parse_rule(rubric)
    assert [answer for answer in met if not rule(answer)] == [] and [
        answer for answer in not_met if rule(answer)
    ] == []


@pytest.mark.parametrize(
    "rubric",
    [
        "The answer names the gate.",
        "The response: it must be short",
        "contains:",
        "contains any of: a | | b",
        "at most many words",
        "at most 3 bananas",
        "at most 12345678 words",
        "valid YAML",
        "matches: [a",
        r"matches: \p{Nothing}",
        "matches: " + "a" * 1001,
        "matches: " + "(?:" * 400 + "a",
        "",
    ],
)
def test_what_is_no_rule_says_why(rubric: str) -> None:
    with pytest.raises(RuleError) as error:
        parse_rule(rubric)
    assert len(str(error.value)) > 10 and "\n" not in str(error.value)


def test_a_regular_expression_that_takes_forever_is_stopped_and_fails_the_episode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rubric_rules, "_REGEX_SECONDS", 0.1)
    started = time.monotonic()
    with pytest.raises(
        TaskError,
        match=r"rubrics\[1\] 'matches: \(a\|aa\)\+\$' has a regular expression that was not done after 0.1 s",
    ):
        RuleChecker().verdict("q", "a" * 60 + "!", ["at least 1 word", "matches: (a|aa)+$"])
    assert time.monotonic() - started < 20


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=10).filter(str.strip))
def test_a_rule_and_its_negation_disagree(answer: str, text: str) -> None:
    for kind in ("contains", "matches"):
        try:
            rule, negated = parse_rule(f"{kind}: {text}"), parse_rule(f"not {kind}: {text}")
        except RuleError:
            continue
        assert rule(answer) != negated(answer)
    assert parse_rule(f"contains: {text}")(f"{answer} {text} {answer}") and parse_rule(
        f"starts with: {text}"
    )(f"{text} {answer}")
