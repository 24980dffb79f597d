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


def test_a_stage_without_details_tells_every_tenth_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    with Display(Console(file=output, width=200)).counting("evaluate TMEM", 40) as counter:
        for _ in range(40):
            counter.advance()
    lines = output.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines[1:-1]] == [
        f"evaluate TMEM {done}/40" for done in range(4, 40, 4)
    ]
    assert all(", left " in line for line in lines[1:-1])
    few = io.StringIO()
    with Display(Console(file=few, width=200)).counting("evaluate TMEM", 2) as counter:
        counter.advance()
        counter.advance()
    assert len(few.getvalue().splitlines()) == 3


def test_the_whole_run_has_a_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 20.0, 30.0, 30.0, 90.0, 90.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    output = io.StringIO()
    shown = Display(Console(file=output, width=200))
    shown.expect({"evaluate": 4, "step": 3})
    with shown.counting("evaluate A", 2, "evaluate") as counter:
        counter.advance("one")
        counter.advance("two")
    with shown.counting("step", 3, "step") as counter:
        counter.advance("three")
    lines = output.getvalue().splitlines()
    assert lines[1] == "evaluate A 1/2: one, left 10 s (the whole run: over 30 s)"  # no step was made yet
    assert lines[5] == "step 1/3: three, left 2 min 00 s (the whole run: 2 min 20 s)"


def test_lines_stay_above_the_bar_of_a_terminal() -> None:
    output = io.StringIO()
    console = Console(file=output, width=200, force_terminal=True, highlight=False)
    with Display(console).counting("steps", 2) as counter:
        counter.advance("reward 0.5")
        counter.advance("reward 0.6")
    assert "steps 1/2: reward 0.5\n" in output.getvalue()
    assert "steps 2/2: reward 0.6\n" in output.getvalue()
