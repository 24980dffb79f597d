"""The story of ``evaluate``: what is measured already, what is missing, run it, show all of it.

    cells --> batches of one worker configuration --> workers --> cell: run_episodes --> journal --> file
                 ^                                       |
                 +-- once more, on new workers ----------+  a worker died: its finished episodes are kept;
                                                            the second time the cell is given up

A failed episode is counted in its cell, and runs again when the cell does.
Waits: every episode has a deadline on its worker and another here, so a cell ends. Starting workers have
ray.startup_timeout_s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from actors.protocols import TaskError
from cluster.common.display import Display
from cluster.common.errors import AllFailed, ClusterError, SaveError, StartupError
from cluster.common.git import git_commit
from cluster.evaluation.command import REQUEST_FILE
from cluster.evaluation.plan import Cell
from cluster.evaluation.prepare import Comparison
from cluster.evaluation.report import ComparisonReport, save_comparison
from cluster.evaluation.store import saving, worst
from cluster.evaluation.summary import compare_rows, summarize
from cluster.fleet.ray_runtime import Demand, cancel_on_sigterm, demand, ray_runtime
from cluster.fleet.remote_worker import RemoteWorker
from cluster.inspection.recorder import EpisodeRecorder, recording
from cluster.measure.report import decoding, show
from cluster.measure.rows import EpisodeSource, EvaluationRow, TaskResult, primary_score, run_episodes
from cluster.measure.scores import mean_text
from cluster.runs.mirror import mirrored
from cluster.runs.run_lock import held
from cluster.tracking.registry import dataset_values
from cluster.tracking.tracker import Tracker, start_tracking
from cluster.train.build import worker_set, worker_specs
from cluster.train.run import ending
from configs.files import write_text
from configs.foreign import FLAG, code_in
from configs.mixture import environments
from configs.user_code import ExtensionError

ATTEMPTS = 2

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


@dataclass(frozen=True, slots=True)
class Hooks:
    """Calls to the display and the recorder.

    ``begins``: with the number of tasks left. ``watch``: put the recorder between a cell and its workers.
    """

    begins: Callable[[Cell, int], None]
    advances: Callable[[], None]
    finished: Callable[[Cell], None]
    retries: Callable[[Cell, str], None]
    watch: Callable[[Cell, Sequence[EpisodeSource]], Sequence[EpisodeSource]]


def batches(cells: Sequence[Cell], basis_of: Callable[[Cell], object]) -> list[list[Cell]]:
    """Group cells by what their workers are built from, in the order of each group's first cell.

    The memory and the seed come with each episode, so they do not matter here.
    """
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        c = cell.config
        parts = (c.model, c.environment, c.fast_weights, c.write, c.engine, c.rollout, c.embedder, c.sampling)
        groups.setdefault((*parts, c.evaluation.temperature, basis_of(cell)), []).append(cell)
    return list(groups.values())


async def run_cells(comparison: Comparison, cells: Sequence[Cell], hooks: Hooks) -> dict[str, str]:
    """Run ``cells``; return the reason, by key, for each that was given up.

    Raises StartupError when Ray itself does not start, SaveError.
    """
    if not cells:
        return {}
    needs = [demand(cell.config, learner=False) for cell in cells]
    custom = sorted({resource for need in needs for resource in need.custom})  # the last has the most
    most = Demand(
        max(need.cpus for need in needs), max(need.gpus for need in needs), tuple(dict(custom).items())
    )
    given_up: dict[str, str] = {}
    with ray_runtime(comparison.plan.base, most):
        cancel_on_sigterm()
        for batch in batches(cells, lambda cell: comparison.bases[cell.key]):
            given_up |= await _run_batch(comparison, batch, hooks)
    return given_up


async def _run_batch(comparison: Comparison, batch: Sequence[Cell], hooks: Hooks) -> dict[str, str]:
    waiting = list(batch)
    attempts: dict[str, int] = {}
    given_up: dict[str, str] = {}
    failed_starts = 0  # in a row
    specs = worker_specs(
        batch[0].config, comparison.policy_path, comparison.bases[batch[0].key], comparison.version
    )
    while waiting:
        try:
            async with worker_set(specs) as workers:
                failed_starts = 0
                while waiting:
                    await _run_cell(comparison, waiting[0], workers, hooks)
                    waiting.pop(0)
        except StartupError as error:
            failed_starts += 1
            if failed_starts == ATTEMPTS:  # without workers none of the rest can run
                return given_up | dict.fromkeys((cell.key for cell in waiting), str(error))
            hooks.retries(waiting[0], str(error))
        except SaveError:  # new workers make no room on the disk
            raise
        except (TaskError, ExtensionError) as error:  # the user's code does not start in a worker
            return given_up | dict.fromkeys((cell.key for cell in waiting), str(error))
        except AllFailed as error:  # new workers run the same code
            given_up[waiting.pop(0).key] = str(error)
        except ClusterError as error:
            cell = waiting[0]
            attempts[cell.key] = attempts.get(cell.key, 0) + 1
            if attempts[cell.key] == ATTEMPTS:
                given_up[cell.key] = str(error)
                waiting.pop(0)
            else:
                hooks.retries(cell, str(error))
    return given_up


async def _run_cell(
    comparison: Comparison, cell: Cell, workers: Sequence[RemoteWorker], hooks: Hooks
) -> None:
    """Run every task that the cell's journal does not have yet."""
    store = comparison.store
    begun = store.begun(cell)
    have = {task.position for task in begun}
    left = [
        (position, task) for position, task in enumerate(comparison.tasks[cell.key]) if position not in have
    ]
    hooks.begins(cell, len(left))
    for worker in workers:
        await worker.measure()  # forget the peak of the cell before
    with store.journal(cell, begun) as journal:

        def keep(result: TaskResult) -> None:
            journal.add(result)
            hooks.advances()

        row = EvaluationRow(cell.key, cell.config.memory, cell.config.seed)
        await run_episodes(row, left, hooks.watch(cell, workers), cell.config.engine.slots, keep)
    peaks = [await worker.measure() for worker in workers]
    if (before := store.finished(cell)) is not None:  # this run repeated only the failed episodes
        peaks.append(before.peak)
    store.finish(cell, journal.tasks, worst(peaks))
    hooks.finished(cell)
