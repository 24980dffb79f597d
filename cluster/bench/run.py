"""``python -m cluster bench``: each benchmark in a process of its own, then tables, Markdown, JSON, plots and MLflow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.harness import child
from cluster.bench.machine import describe
from cluster.bench.report import HEADER, case_cells, metrics, save
from cluster.bench.suite import Entry, find, run_one
from cluster.bench.values import BenchError, Context, Outcome
from cluster.common.display import Display, duration
from cluster.measure.report import rich_table
from cluster.tracking.tracker import RunStatus, open_run
from configs.models import resolve_model
from configs.schema import ModelConfig, TrackingConfig

LONGEST_S = 7200.0


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What the command line says. No ``names``: all."""

    names: tuple[str, ...]
    model: str
    repeats: int
    threads: int
    quick: bool
    output_dir: Path
    tracking: bool


class Runner:
    """What the child process holds."""

    def run(self, name: str, context: Context) -> Outcome:
        return run_one(name, context)


def bench(options: BenchOptions, display: Display) -> dict[str, Outcome]:
    """Run, show, save, track. A benchmark that fails does not keep the others from running; BenchError at the end names it. Raises ModelError,
    TrackingError; what was measured by then is in the folder."""
    entries = find(options.names)
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
        for entry in entries:
            try:
                outcomes[entry.name] = _run_child(entry, context, display)
            except BenchError as error:
                failed.append(f"{entry.name}: {error}")
                display.say(f"FAILED {failed[-1]}")
                continue
            paths = save(folder, facts, outcomes, {one.name: one.about for one in entries})
            tracker.log(metrics(entry.name, outcomes[entry.name]), step=0)
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


def _run_child(entry: Entry, context: Context, display: Display) -> Outcome:
    display.say(f"{entry.name}: {entry.about}")
    began = time.monotonic()
    with child(entry.name, Runner, ()) as process:
        outcome: Outcome = process.call("run", (entry.name, context), LONGEST_S)
    if not isinstance(outcome, Outcome):
        raise BenchError(f"{entry.name} gave back a {type(outcome).__name__}, not an Outcome")
    if outcome.cases:
        display.console.print(
            rich_table(
                f"{entry.name} ({duration(time.monotonic() - began)})",
                HEADER,
                [case_cells(case) for case in outcome.cases],
            )
        )
    for case in outcome.cases:
        if case.note:
            display.say(f"  {case.name}: {case.note}")
    for table in outcome.tables:
        display.console.print(rich_table(table.title, table.header, table.rows))
    return outcome
