"""The harness of `python -m cluster bench`, without any engine: turns, children, ratios, reports."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.bench import run as bench_run
from cluster.bench.harness import child, in_turns
from cluster.bench.run import case_cells, metrics, save
from cluster.bench.suite import ABOUT, find
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from cluster.cli import EXIT_USAGE, main
from cluster.common.display import Display
from cluster.measure.report import Table
from tests.unit.held import Held


def case(goal: Goal | None) -> Case:
    return Case(
        "eight | episodes",
        "PEFT loop",
        "writer",
        "s",
        (6.0, 12.0, 8.0),
        (1.0, 2.0, 2.0),
        "baseline/candidate",
        goal,
        "a note",
    )


def test_a_ratio_is_the_median_over_pairs_and_a_missed_goal_is_shown() -> None:
    assert case(None).ratios.median == 6.0
    assert case_cells(case(Goal("at least", 5)))[-1] == "met"
    assert case_cells(case(Goal("at least", 7)))[-1] == "MISSED"
    assert case_cells(case(Goal("at most", 5)))[-1] == "MISSED"
    assert case_cells(case(None))[-2:] == ("-", "")


def test_a_case_without_its_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="1 values of the baseline, 0 of the candidate"):
        Case("x", "a", "b", "s", (1.0,), (), "baseline/candidate", None)


def test_turns_alternate_after_a_warm_up_and_swap_their_order() -> None:
    order: list[str] = []

    def work(name: str) -> Timing:
        order.append(name)
        return Timing(1.0, 1.0)

    timings = in_turns({"a": lambda: work("a"), "b": lambda: work("b")}, repeats=3)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert len(timings["a"]) == len(timings["b"]) == 3


def test_a_child_holds_its_object_between_calls_and_names_what_failed() -> None:
    with child("adder", Held, (1,)) as process:
        assert process.call("add", (2,), 60) == 3
        assert process.call("add", (2,), 60) == 5
        with pytest.raises(BenchError, match="adder: add failed: TypeError"):
            process.call("add", ("x",), 60)
        with pytest.raises(BenchError, match=r"adder: nap took longer than 0 s"):
            process.call("nap", (30.0,), 0.2)


def test_a_child_that_dies_or_does_not_start_ends_the_wait() -> None:
    with child("mortal", Held, (1,)) as process, pytest.raises(BenchError, match="mortal died during die"):
        process.call("die", (), 60)
    with (
        pytest.raises(BenchError, match="its start failed: ValueError: start=-1 is not allowed"),
        child("unborn", Held, (-1,)),
    ):
        pass


def test_the_report_holds_every_value_and_says_what_it_compared(tmp_path: Path) -> None:
    outcome = Outcome(
        (case(Goal("at least", 7)),),
        (Table("Memory", ("rows", "MiB"), (("8", "12"),)),),
        (tmp_path / "plot.png",),
        {"rate": 0.5},
    )
    markdown, saved = save(tmp_path, {"machine": "two cores"}, {"writer": outcome})
    text = markdown.read_text()
    assert "- machine: two cores" in text
    assert f"{ABOUT['writer']}." in text
    measured = "PEFT loop: 8 s | writer: 2 s | baseline/candidate 6 [5, 6] | at least 7 | MISSED |"
    assert rf"| eight \| episodes | {measured}" in text
    assert "- eight | episodes: a note" in text
    assert "| 8 | 12 |" in text and "![plot](plot.png)" in text
    data = json.loads(saved.read_text())["benchmarks"]["writer"]
    assert data["cases"][0]["baseline_values"] == [6.0, 12.0, 8.0]
    assert metrics("writer", outcome) == {"bench/writer/eight___episodes": 6.0, "bench/writer/rate": 0.5}


def test_benchmarks_are_found_by_name_and_a_wrong_name_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert find(()) == tuple(ABOUT)
    assert find(("refresh", "writer")) == ("writer", "refresh")
    assert main(["bench", "writr", "--no-tracking"]) == EXIT_USAGE
    assert "error: no benchmark 'writr': there are writer, revisions" in capsys.readouterr().err


def test_a_benchmark_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path
) -> None:
    def measured(name: str, context: Context, display: Display) -> Outcome:
        if name == "writer":
            raise BenchError("writer died before run: out of memory?")
        return Outcome((case(None),), (), (), {})

    monkeypatch.setattr(bench_run, "_run_child", measured)
    options = bench_run.BenchOptions(
        ("writer", "cost"), str(tiny_model_path), 1, 1, True, tmp_path, tracking=False
    )
    said = io.StringIO()
    with pytest.raises(BenchError, match="writer: writer died before run"):
        bench_run.bench(options, Display(Console(file=said)))
    (report,) = tmp_path.glob("bench-*/report.json")
    assert (
        list(json.loads(report.read_text())["benchmarks"]) == ["cost"] and "FAILED writer" in said.getvalue()
    )
