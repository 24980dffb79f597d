"""The story of ``python -m cluster evaluate``: what is there already, what is missing, run it, show all of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.common.display import Display
from cluster.common.errors import ClusterError
from cluster.common.git import git_commit
from cluster.evaluation.arguments import REQUEST_FILE
from cluster.evaluation.drive import Hooks, run_cells
from cluster.evaluation.plan import Cell
from cluster.evaluation.plots import save_plots
from cluster.evaluation.prepare import Comparison
from cluster.evaluation.report import COST_LEGEND, ComparisonReport, Table, save_comparison
from cluster.evaluation.store import saving
from cluster.evaluation.summary import PRIMARY, Bootstrap, compare_rows, summarize
from cluster.inspection.recorder import EpisodeRecorder
from cluster.inspection.start import recording
from cluster.measure.report import MOST_CATEGORIES, decoding, rich_table
from cluster.measure.rows import EpisodeSource
from cluster.runs.run_lock import held
from cluster.tracking.registry import dataset_values
from cluster.tracking.tracker import Tracker, start_tracking
from cluster.train.run import ending

_BYTES = {"float32": 4, "bfloat16": 2}


async def evaluate(comparison: Comparison, display: Display) -> None:
    """Raises ClusterError when Ray does not start or the disk is full, or at the end, the report being written, when a cell was given up or has no
    finished episode.
    """
    with held(comparison.folder):
        await _evaluate(comparison, display)


async def _evaluate(comparison: Comparison, display: Display) -> None:
    tracker = _track(comparison)
    with ending(tracker, display), _resumable(comparison, display):
        missing = _missing(comparison)
        display.say(
            f"{_overview(comparison)}; {len(comparison.plan.cells) - len(missing)} done before: {comparison.folder}"
        )
        with recording(
            comparison.plan.base, comparison.folder, comparison.model.path, tracker.run_id
        ) as recorder:
            given_up = await _measure(comparison, missing, display, recorder)
        _report(comparison, given_up, tracker, display)
        require_measured(comparison, given_up)


def _missing(comparison: Comparison) -> list[Cell]:
    """The cells that are not finished, or not without a failed episode."""
    return [
        cell
        for cell in comparison.plan.cells
        if (done := comparison.store.finished(cell)) is None or done.result.failed
    ]


def require_measured(comparison: Comparison, given_up: Mapping[str, str]) -> None:
    """Raises ClusterError for cells that were given up, or of which every episode failed: a script must not take those for measured."""
    problems = dict(given_up)
    for cell in comparison.plan.cells:
        done = comparison.store.finished(cell)
        if done is not None and not done.result.episodes:
            problems[cell.key] = (
                f"all its {len(done.result.failed)} episodes failed, the first with {done.result.failed[0]}"
            )
    if problems:
        key, why = next(iter(problems.items()))
        cure = f"mend the cause, then --resume {comparison.folder} runs them again"
        raise ClusterError(
            f"{len(problems)} of {len(comparison.plan.cells)} cells could not be measured, the first {key}: {why}; {cure}"
        )


async def _measure(
    comparison: Comparison, missing: list[Cell], display: Display, recorder: EpisodeRecorder
) -> dict[str, str]:
    """Run the missing cells with progress over their episodes; returns why some were given up."""
    if not missing:
        return {}
    for benchmark, (there, wanted) in {
        cell.benchmark: (len(comparison.tasks[cell.key]), cell.config.evaluation.tasks) for cell in missing
    }.items():
        if there < wanted:
            display.say(
                f"{benchmark}: its held-out split has {there} tasks, fewer than evaluation.tasks={wanted}: all are used"
            )
    total = sum(len(comparison.tasks[cell.key]) - len(comparison.store.begun(cell)) for cell in missing)
    with display.counting("evaluate", total) as counter:
        numbers = {cell.key: number for number, cell in enumerate(missing, start=1)}

        def begins(cell: Cell, left: int) -> None:
            display.say(
                f"cell {numbers[cell.key]} of {len(missing)}: {_named(cell)}, {left} episodes; all in {counter.time_left}"
            )

        def finished(cell: Cell) -> None:
            done = comparison.store.finished(cell)
            assert done is not None
            scores = [
                value for episode in done.result.episodes if math.isfinite(value := episode.mean(PRIMARY))
            ]
            mean = f"{PRIMARY.upper()} {100 * sum(scores) / len(scores):.1f} %" if scores else "no score"
            display.say(
                f"  {_named(cell)}: {mean}, {len(done.result.episodes)} finished, {len(done.result.failed)} failed"
            )

        def retries(cell: Cell, why: str) -> None:
            display.say(f"  {_named(cell)}: {why}; once more on new workers")

        def watch(cell: Cell, workers: Sequence[EpisodeSource]) -> Sequence[EpisodeSource]:
            return recorder.watch(workers, cell.config, comparison.step)

        return await run_cells(comparison, missing, Hooks(begins, counter.advance, finished, retries, watch))


def build_report(comparison: Comparison, given_up: Mapping[str, str]) -> ComparisonReport:
    """Of whatever is finished."""
    plan, base = comparison.plan, comparison.plan.base
    found = {
        cell.key: result for cell in plan.cells if (result := comparison.store.finished(cell)) is not None
    }
    bootstrap = Bootstrap(base.evaluation.bootstrap_samples, base.seed)
    rows = summarize(plan.cells, found, given_up)
    return ComparisonReport(
        facts=_facts(comparison),
        rows=rows,
        costs=tuple(row.cost(comparison.model, _BYTES[base.model.dtype]) for row in rows),
        differences=compare_rows(rows, plan.baselines, bootstrap),
        bootstrap=bootstrap,
    )


def _report(comparison: Comparison, given_up: Mapping[str, str], tracker: Tracker, display: Display) -> None:
    report = build_report(comparison, given_up)
    folder = comparison.folder / "report"
    with saving(folder):
        folder.mkdir(exist_ok=True)
    plots: list[Path] = []
    for benchmark in report.benchmarks:
        _show(report.scores(benchmark), display)
        by_category = report.categories(benchmark, PRIMARY)
        if by_category.lines and len(by_category.header) <= 1 + MOST_CATEGORIES:
            _show(by_category, display)
        _show(report.cost(benchmark), display)
        for event in report.events(benchmark):
            display.say(event)
        pairs = report.of(benchmark)
        with saving(folder):
            plots += save_plots(
                [row for row, _ in pairs], [cost for _, cost in pairs], report.bootstrap, folder
            )
    for line in (report.scores_legend, COST_LEGEND, *report.verdicts(), *report.problems()):
        display.say(line)
    with saving(folder):
        written = save_comparison(report, plots, folder)
    for path in [*written, *plots, comparison.folder / REQUEST_FILE]:
        tracker.artifact(path)
    tracker.log(report.metrics(), comparison.step)
    display.say(f"report:  {folder}")
    display.say(f"metrics: {tracker.location}")


def _show(table: Table, display: Display) -> None:
    display.console.print(rich_table(table.title, table.header, table.lines))


def _track(comparison: Comparison) -> Tracker:
    """The run in MLflow; a resumed evaluation goes on with its own."""
    path = comparison.folder / "tracking-run"
    config = comparison.plan.base
    before = path.read_text(encoding="utf-8") if path.exists() and config.tracking.enabled else ""
    tracker = start_tracking(
        config, comparison.folder.parent, comparison.folder.name, comparison.config_path, before
    )
    for environment in {
        repr(cell.config.environment): cell.config.environment for cell in comparison.plan.cells
    }.values():
        tracker.dataset(dataset_values(environment, "evaluation"))
    if tracker.run_id:
        path.write_text(tracker.run_id, encoding="utf-8")
    return tracker


@contextmanager
def _resumable(comparison: Comparison, display: Display) -> Iterator[None]:
    """Tell the user of an evaluation that broke or was stopped how to go on."""
    try:
        yield
    except (ClusterError, KeyboardInterrupt, asyncio.CancelledError):
        display.say(f"what was measured is in {comparison.folder}")
        display.say(f"to run what is missing: python -m cluster evaluate --resume {comparison.folder}")
        raise


def _overview(comparison: Comparison) -> str:
    plan = comparison.plan
    seeds = len({cell.config.seed for cell in plan.cells})
    parts = (f"{len(plan.labels)} row(s)", f"{len(plan.benchmarks)} benchmark(s)", f"{seeds} seed(s)")
    return f"{' x '.join(parts)} = {len(plan.cells)} cells"


def _named(cell: Cell) -> str:
    return f"{cell.benchmark}, {cell.variant.label}, seed {cell.config.seed}"


def _facts(comparison: Comparison) -> dict[str, str]:
    config, checkpoint = comparison.plan.base, comparison.checkpoint
    seeds = sorted({cell.config.seed for cell in comparison.plan.cells})
    return {
        "policy": "the base model"
        if checkpoint is None
        else f"{checkpoint.run_dir.name}/{checkpoint.folder.name}",
        "model": f"{config.model.name} ({config.model.dtype}, weights {comparison.model.fingerprint[:12]})",
        "configuration": f"{config.name}, seeds {', '.join(map(str, seeds))}",
        "decoding": ", ".join(
            sorted({decoding(cell.config.evaluation.temperature) for cell in comparison.plan.cells})
        ),
        "commit": git_commit(Path(__file__).parent) or "unknown",
    }
