"""Progress as plain lines, and on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.common import display
from cluster.common.display import Display, duration


def test_a_stage_is_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0, 120.0, 130.0])  # at the start, after each of two details, at the end
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    output = io.StringIO()
    shown = Display(Console(file=output, width=200))
    with shown.counting("steps", 4) as counter:
        counter.advance("reward [0.5]")
        counter.advance("reward 0.6")
    shown.say("[done]")
    assert output.getvalue().splitlines() == [
        "steps: 4 to do",
        "steps 1/4: reward [0.5], left 30 s",  # three more at 10 s
        "steps 2/4: reward 0.6, left 20 s",
        "steps: 2 of 4 in 30 s",
        "[done]",
    ]


def test_a_terminal_shows_a_bar_and_its_end() -> None:
    output = io.StringIO()
    console = Console(file=output, width=200, force_terminal=True, highlight=False)
    with Display(console).counting("steps", 2) as counter:
        counter.advance("reward [0.5]")
    assert "reward [0.5]" in output.getvalue()
    assert "steps: 1 of 2 in 0 s" in output.getvalue()


def test_a_duration_has_two_units_at_most() -> None:
    assert [duration(seconds) for seconds in (-1, 12.4, 185, 3600, 7800)] == [
        *("0 s", "12 s", "3 min 05 s"),
        *("1 h 00 min", "2 h 10 min"),
    ]
