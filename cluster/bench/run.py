"""``bench``: each benchmark in its own process, then tables, Markdown, JSON, plots and MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.bench.harness import child
from cluster.bench.machine import describe
from cluster.bench.suite import ABOUT, Runner, find
from cluster.bench.values import BenchError, Case, Context, Outcome, Spread
from cluster.common.display import Display, duration
from cluster.measure.report import Document, Section, Table, save_document, show
from cluster.tracking.tracker import RunStatus, open_run
from configs.models import resolve_model
from configs.schema import ModelConfig, TrackingConfig

LONGEST_S = 7200.0
HEADER = ("case", "baseline", "candidate", "ratio [quartiles]", "goal", "")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The command line. No ``names``: all."""

    names: tuple[str, ...]
    model: str
    repeats: int
    threads: int
    quick: bool
    output_dir: Path
    tracking: bool


def bench(options: BenchOptions, display: Display) -> dict[str, Outcome]:
    """Run, show, save, track. A benchmark that fails does not keep the others from running.

    Raises BenchError at the end for those that failed, ModelError, TrackingError. The folder keeps what was
    measured before.
    """
    names = find(options.names)
    model = resolve_model(ModelConfig(name=options.model))
    folder = (options.output_dir / f"bench-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    folder.mkdir(parents=True)
    context = Context(model.path, options.repeats, options.threads, options.quick, folder)
    facts = {"model": options.model, **describe(options.threads)}
    if options.quick:
        facts["quick"] = "yes: these figures only show that it runs"
    tracker = open_run(
        TrackingConfig(enabled=options.tracking, experiment="engram-bench"),
        options.output_dir.absolute(),
        folder.name,
        facts,
        resumed_run_id="",
    )
    status: RunStatus = "FAILED"
    outcomes: dict[str, Outcome] = {}
    paths: list[Path] = []
    failed: list[str] = []
    try:
        for name in names:
            try:
                outcomes[name] = _run_child(name, context, display)
            except BenchError as error:
                failed.append(f"{name}: {error}")
                display.say(f"FAILED {failed[-1]}")
                continue
            paths = save(folder, facts, outcomes)  # each time: a run that is stopped keeps what it measured
            tracker.log(metrics(name, outcomes[name]), step=0)
        for path in [*paths, *(plot for outcome in outcomes.values() for plot in outcome.plots)]:
            tracker.artifact(path)
        status = "FAILED" if failed else "FINISHED"
    finally:
        tracker.finish(status)
    display.say(f"report:  {folder / 'report.md'}")
    display.say(f"metrics: {tracker.location}")
    if failed:
        raise BenchError("; ".join(failed))
    return outcomes


def _run_child(name: str, context: Context, display: Display) -> Outcome:
    display.say(f"{name}: {ABOUT[name]}")
    began = time.monotonic()
    with child(name, Runner, ()) as process:
        outcome: Outcome = process.call("run", (name, context), LONGEST_S)
    if not isinstance(outcome, Outcome):
        raise BenchError(f"{name} gave back a {type(outcome).__name__}, not an Outcome")
    show(Document(name, {}, (section(name, outcome),)), display)
    display.say(f"{name}: measured in {duration(time.monotonic() - began)}")
    return outcome


# --- the report -------------------------------------------------------------------------------------------


def section(name: str, outcome: Outcome) -> Section:
    """The cases in one table, then the benchmark's own tables."""
    cases = Table("", HEADER, tuple(map(case_cells, outcome.cases)))
    tables = (cases, *outcome.tables) if outcome.cases else outcome.tables
    notes = tuple(f"{case.name}: {case.note}" for case in outcome.cases if case.note)
    return Section(name, f"{ABOUT[name]}.", tables, notes, outcome.plots)


def case_cells(case: Case) -> tuple[str, ...]:
    """One line of the table, in the order of HEADER."""
    ratios = case.ratios
    goal, verdict = "-", ""
    if case.goal is not None:
        goal = f"{case.goal.sense} {case.goal.value:g}"
        verdict = "met" if case.goal.met(ratios.median) else "MISSED"
    return (
        case.name,
        f"{case.baseline}: {Spread.of(case.baseline_values).median:.4g} {case.unit}",
        f"{case.candidate}: {Spread.of(case.candidate_values).median:.4g} {case.unit}",
        f"{case.ratio} {ratios.median:.3g} [{ratios.low:.3g}, {ratios.high:.3g}]",
        goal,
        verdict,
    )


def metrics(name: str, outcome: Outcome) -> dict[str, float]:
    """For the tracker: the median ratio of each case, and the figures, in characters that MLflow takes."""
    figures = {**{case.name: case.ratios.median for case in outcome.cases}, **outcome.figures}
    return {"/".join(("bench", name, re.sub(r"[^\w.-]", "_", key))): value for key, value in figures.items()}


def save(folder: Path, facts: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> list[Path]:
    """Write report.md, and report.json with every value that was measured, not only the medians."""
    benchmarks: dict[str, Any] = {
        name: {
            "cases": [{**asdict(case), "ratios": case.ratios} for case in outcome.cases],
            "figures": outcome.figures,
            "tables": outcome.tables,
            "plots": [plot.name for plot in outcome.plots],
        }
        for name, outcome in outcomes.items()
    }
    sections = tuple(section(name, outcome) for name, outcome in outcomes.items())
    data = {"environment": facts, "benchmarks": benchmarks}
    return save_document(Document("Benchmarks", facts, sections), folder, data)
