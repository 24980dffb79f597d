"""The story of ``evaluate``: what is measured already, what is missing, run it, show all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from cluster.common.display import Display
from cluster.common.errors import ClusterError
from cluster.common.git import git_commit
from cluster.evaluation.command import REQUEST_FILE
from cluster.evaluation.drive import Hooks, run_cells
from cluster.evaluation.plan import Cell
from cluster.evaluation.prepare import Comparison
from cluster.evaluation.report import ComparisonReport, save_comparison
from cluster.evaluation.store import saving
from cluster.evaluation.summary import compare_rows, summarize
from cluster.inspection.recorder import EpisodeRecorder, recording
from cluster.measure.report import decoding, show
from cluster.measure.rows import EpisodeSource, primary_score
from cluster.measure.scores import mean_text
from cluster.runs.mirror import mirrored
from cluster.runs.run_lock import held
from cluster.tracking.registry import dataset_values
from cluster.tracking.tracker import Tracker, start_tracking
from cluster.train.run import ending
from configs.files import write_text
from configs.foreign import FLAG, code_in
from configs.mixture import environments

_BYTES = {"float32": 4, "bfloat16": 2}


async def evaluate(comparison: Comparison, display: Display) -> None:
    """Run the missing cells, then report.

    Raises ClusterError when Ray does not start or the disk is full. Also after the report is written, when a
    cell was given up or has no finished episode.
    """
    config, folder = comparison.plan.base, comparison.folder
    with held(folder), mirrored(config, folder, display.say) as saved:
        await _evaluate(comparison, display, saved)


async def _evaluate(comparison: Comparison, display: Display, saved: Callable[[], None]) -> None:
    tracker = _track(comparison)
    with ending(tracker, display), _resumable(comparison, display):
        missing, base = _missing(comparison), comparison.plan.base
        done = len(comparison.plan.cells) - len(missing)
        display.say(f"{_overview(comparison)}; {done} done before: {comparison.folder}")
        with recording(base, comparison.folder, comparison.model.path, tracker.run_id) as recorder:
            given_up = await _measure(comparison, missing, display, recorder, saved)
        _report(comparison, given_up, tracker, display)
        require_measured(comparison, given_up)


def _missing(comparison: Comparison) -> list[Cell]:
    """The cells that are not finished, or have a failed episode."""
    return [
        cell
        for cell in comparison.plan.cells
        if (done := comparison.store.finished(cell)) is None or done.result.failed
    ]


def require_measured(comparison: Comparison, given_up: Mapping[str, str]) -> None:
    """Raise ClusterError for cells that were given up, or whose episodes all failed.

    Else a script would take these for measured.
    """
    cells, problems = comparison.plan.cells, dict(given_up)
    for cell in cells:
        done = comparison.store.finished(cell)
        if done is not None and not done.result.episodes:
            failed = done.result.failed
            problems[cell.key] = f"all its {len(failed)} episodes failed, the first with {failed[0]}"
    if problems:
        key, why = next(iter(problems.items()))
        count = f"{len(problems)} of {len(cells)} cells could not be measured"
        cure = f"mend the cause, then --resume {comparison.folder} runs them again"
        raise ClusterError(f"{count}, the first {key}: {why}; {cure}")


async def _measure(
    comparison: Comparison,
    missing: list[Cell],
    display: Display,
    recorder: EpisodeRecorder,
    saved: Callable[[], None],
) -> dict[str, str]:
    """Run the missing cells with progress over their episodes; return why some were given up."""
    if not missing:
        return {}
    for cell in {cell.benchmark: cell for cell in missing}.values():
        there, wanted = len(comparison.tasks[cell.key]), cell.config.evaluation.tasks
        if there < wanted:
            fewer = f"its held-out split has {there} tasks, fewer than evaluation.tasks={wanted}"
            display.say(f"{cell.benchmark}: {fewer}: all are used")
    total = sum(len(comparison.tasks[cell.key]) - len(comparison.store.begun(cell)) for cell in missing)
    with display.counting("evaluate", total) as counter:
        numbers = {cell.key: number for number, cell in enumerate(missing, start=1)}

        def begins(cell: Cell, left: int) -> None:
            place = f"cell {numbers[cell.key]} of {len(missing)}"
            display.say(f"{place}: {_named(cell)}, {left} episodes; all in {counter.time_left}")

        def finished(cell: Cell) -> None:
            saved()
            done = comparison.store.finished(cell)
            assert done is not None
            row = done.result
            score = primary_score(row.episodes)
            scores = row.values(score)
            mean = mean_text(score, sum(scores) / len(scores)) if scores else "no score"
            display.say(f"  {_named(cell)}: {mean}, {len(row.episodes)} finished, {len(row.failed)} failed")

        def retries(cell: Cell, why: str) -> None:
            display.say(f"  {_named(cell)}: {why}; once more on new workers")

        def watch(cell: Cell, workers: Sequence[EpisodeSource]) -> Sequence[EpisodeSource]:
            return recorder.watch(workers, cell.config, comparison.step)

        return await run_cells(comparison, missing, Hooks(begins, counter.advance, finished, retries, watch))


def build_report(comparison: Comparison, given_up: Mapping[str, str]) -> ComparisonReport:
    """Report the cells that are finished."""
    plan, base = comparison.plan, comparison.plan.base
    finished = {cell.key: comparison.store.finished(cell) for cell in plan.cells}
    results = {key: result for key, result in finished.items() if result is not None}
    rows = summarize(plan.cells, results, given_up)
    return ComparisonReport(
        facts=_facts(comparison),
        rows=rows,
        costs=tuple(row.cost(comparison.model, _BYTES[base.model.dtype]) for row in rows),
        differences=compare_rows(rows, plan.baselines),
    )


def _report(comparison: Comparison, given_up: Mapping[str, str], tracker: Tracker, display: Display) -> None:
    report = build_report(comparison, given_up)
    show(report.document(), display)  # first: the disk may be full
    folder = comparison.folder / "report"
    with saving(folder):
        written = save_comparison(report, folder)
    for path in [*written, comparison.folder / REQUEST_FILE]:
        tracker.artifact(path)
    tracker.log(report.metrics(), comparison.step)
    display.say(f"report:  {folder}")
    display.say(f"metrics: {tracker.location}")


def _track(comparison: Comparison) -> Tracker:
    """Open the run in MLflow; a resumed evaluation continues its own."""
    path = comparison.folder / "tracking-run"
    config = comparison.plan.base
    before = path.read_text(encoding="utf-8") if path.exists() and config.tracking.enabled else ""
    tracker = start_tracking(
        config, comparison.folder.parent, comparison.folder.name, comparison.config_path, before
    )
    played = (environments(cell.config.environment) for cell in comparison.plan.cells)
    for environment in dict.fromkeys(chain.from_iterable(played)):
        tracker.dataset(dataset_values(environment, "evaluation"))
    if tracker.run_id:
        write_text(path, tracker.run_id)
    return tracker


@contextmanager
def _resumable(comparison: Comparison, display: Display) -> Iterator[None]:
    """When an evaluation fails or is stopped, tell the user how to continue it."""
    try:
        yield
    except (ClusterError, KeyboardInterrupt, asyncio.CancelledError):
        display.say(f"what was measured is in {comparison.folder}")
        flag = f" {FLAG}" if any(code_in(cell.config) for cell in comparison.plan.cells) else ""
        display.say(f"to run what is missing: engram evaluate --resume {comparison.folder}{flag}")
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
    policy = "the base model"
    if checkpoint is not None:
        policy = checkpoint.title
    decodings = {decoding(cell.config.evaluation.temperature) for cell in comparison.plan.cells}
    return {
        "policy": policy,
        "model": f"{config.model.name} ({config.model.dtype}, weights {comparison.model.fingerprint[:12]})",
        "configuration": f"{config.name}, seeds {', '.join(map(str, seeds))}",
        "decoding": ", ".join(sorted(decodings)),
        "commit": git_commit(Path(__file__).parent) or "unknown",
    }
