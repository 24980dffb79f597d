"""The story of one run, told in order: evaluate, warm start, train, evaluate, report.

    memory off | TMEM before --> [warm start --> TMEM after warm start] --> loop --> TMEM after RL --> table, files, tracker

Each row is saved when it is measured, so that a resumed run shows those from before it was interrupted.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.common.display import Display
from cluster.common.ray_job import current_job, note_run
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.ledger import ledger_line
from cluster.fleet.remote_worker import RemoteWorker
from cluster.fleet.stream import Batch
from cluster.inspection.recorder import EpisodeRecorder
from cluster.inspection.start import recording
from cluster.measure.report import HEADER, LEGEND, MOST_CATEGORIES, Report, rich_table, save_report
from cluster.measure.rows import (
    EpisodeSource,
    EvaluationRow,
    RowResult,
    evaluate_row,
    load_row,
    row_metrics,
    save_row,
)
from cluster.runs.checkpoint import TrainState, best_checkpoint, list_checkpoints, score_of
from cluster.runs.kept_models import kept_models
from cluster.runs.resume import note_run_id
from cluster.runs.run_lock import held
from cluster.runs.wanted_workers import WantedWorkers
from cluster.tracking.registry import dataset_values
from cluster.tracking.tracker import RunStatus, Tracker, start_tracking
from cluster.train.build import (
    TrainingCluster,
    build_demonstrations,
    build_fleet,
    build_stream,
    start_state,
    training_cluster,
)
from cluster.train.loop import LoopParts, run_loop
from cluster.train.metrics import StepSummary, step_line
from cluster.train.prepare import Preparation
from cluster.train.step_checkpoints import Keeper, save_state
from cluster.train.timeline import KeptTimeline, save_timeline
from cluster.train.warm_start import warm_start
from configs.schema import MemoryPolicy, RunConfig

_MEMORY_NAMES: Mapping[MemoryPolicy, str] = {
    "full": "full context",
    "truncation": "no memory",
    "paging": "MemGPT",
    "summary": "MemAgent",
    "state": "MEM1",
    "notes": "A-MEM",
    "raw": "raw writes",
    "summary_write": "summary SFT",
    "implications": "SEAL",
    "parametric": "TMEM",
    "hybrid": "summary + TMEM",
    "custom": "custom memory",
}
ROW_ORDER = ("memory_off", "before", "after_warm_start", "after_rl")
COMPARED = (
    ("before", "after_rl"),
    ("after_warm_start", "after_rl"),
    ("memory_off", "after_rl"),
    ("memory_off", "before"),
)


def evaluation_rows(config: RunConfig) -> dict[str, EvaluationRow]:
    """The rows that this run can have, by key (the name of its file and of its metrics)."""
    name = _MEMORY_NAMES[config.memory.policy]
    if config.memory.policy == "parametric" and config.memory.question_blind:
        name = f"{name}, question-blind"
    rows = {
        "before": EvaluationRow(f"{name} before", config.memory, config.seed),
        "after_warm_start": EvaluationRow(f"{name} after warm start", config.memory, config.seed),
        "after_rl": EvaluationRow(f"{name} after RL", config.memory, config.seed),
    }
    if config.evaluation.memory_off_row and config.memory.policy != "truncation":
        rows["memory_off"] = EvaluationRow(
            "memory off", replace(config.memory, policy="truncation"), config.seed
        )
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class Scoreboard:
    """Measures the rows of a run and keeps them in its folder."""

    preparation: Preparation
    workers: Sequence[RemoteWorker]
    tracker: Tracker
    display: Display
    recorder: EpisodeRecorder

    async def measure(self, key: str, step: int) -> None:
        """Evaluate one row now, unless it is there already or is not wanted."""
        row = evaluation_rows(self.preparation.config).get(key)
        if row is None or self._file(key).exists():
            return
        tasks, slots = self.preparation.eval_tasks, self.preparation.config.engine.slots
        wanted = self.preparation.config.evaluation.tasks
        if len(tasks) < wanted:
            self.display.say(
                f"the held-out split has {len(tasks)} tasks, fewer than evaluation.tasks={wanted}: all are used"
            )
        with self.display.counting(f"evaluate {row.label}", len(tasks)) as counter:
            workers = self.recorder.watch(self.workers, self.preparation.config, step)
            result = await evaluate_row(row, tasks, workers, slots, counter.advance)
        save_row(result, self._file(key))
        self.tracker.log(row_metrics(result, key), step)

    def forget(self, key: str) -> None:
        """A row measured before this run was resumed to go further."""
        self._file(key).unlink(missing_ok=True)

    def report(self, rewards: tuple[float, ...]) -> None:
        """Show the table and what it means; save and track the same."""
        config = self.preparation.config
        rows = {key: load_row(self._file(key)) for key in ROW_ORDER if self._file(key).exists()}
        report = Report(
            tuple(rows.values()),
            rewards,
            config.evaluation.bootstrap_samples,
            config.seed,
            config.evaluation.temperature,
        )
        pairs = [
            (rows[before].label, rows[after].label)
            for before, after in COMPARED
            if before in rows and after in rows
        ]
        comparisons = report.comparisons(pairs)
        self.display.console.print(rich_table(report.title, HEADER, report.cells()))
        self.display.say(LEGEND)
        header, by_category = report.category_cells("f1")
        if 0 < len(by_category) <= MOST_CATEGORIES:
            self.display.console.print(rich_table("By category", header, by_category))
        for comparison in comparisons:
            self.display.say(comparison.sentence)
        _show_failures(self.display, list(rows.values()))
        folder = self.preparation.run_dir / "report"
        for path in [
            *save_report(report, comparisons, folder),
            *save_timeline(self.preparation.timeline_path, folder),
        ]:
            self.tracker.artifact(path)
        self.display.say(f"report:  {self.preparation.run_dir / 'report'}")
        self.display.say(f"metrics: {self.tracker.location}")

    def _file(self, key: str) -> Path:
        return self.preparation.run_dir / "evaluation" / f"{key}.json"


async def train(preparation: Preparation, display: Display) -> None:
    """The whole of ``python -m cluster train``. Raises ClusterError, LearnerError; what was saved and how to go on has been said by then."""
    with held(preparation.run_dir):
        await _train(preparation, display)


async def _train(preparation: Preparation, display: Display) -> None:
    config, state = preparation.config, start_state(preparation)
    tracker = KeptTimeline(track(preparation), preparation.timeline_path)
    with ending(tracker, display), registered(tracker, preparation), resumable(preparation, display):
        display.say(
            f"starting {config.rollout.workers} rollout worker(s) and {config.learner.workers} learner rank(s): {preparation.run_dir}"
        )
        async with training_cluster(preparation) as cluster:
            await note_run(current_job(os.environ), tracker.run_id)
            await train_on(
                cluster, preparation, tracker, display, replace(state, tracking_run_id=tracker.run_id)
            )
        say_next(preparation, display)


async def train_on(
    cluster: TrainingCluster, preparation: Preparation, tracker: Tracker, display: Display, state: TrainState
) -> TrainState:
    """All stages on a cluster that is up. Afterwards the workers serve the last version."""
    with recording(
        preparation.config, preparation.run_dir, preparation.model_path, tracker.run_id
    ) as recorder:
        return await _stages(cluster, preparation, tracker, display, state, recorder)


async def _stages(
    cluster: TrainingCluster,
    preparation: Preparation,
    tracker: Tracker,
    display: Display,
    state: TrainState,
    recorder: EpisodeRecorder,
) -> TrainState:
    newest: ObjectStoreWeights | None = None
    scores = Scoreboard(preparation, cluster.workers, tracker, display, recorder)
    if preparation.checkpoint is None:
        await scores.measure("memory_off", 0)
        await scores.measure("before", 0)
        state, newest = await _warm_start(preparation, cluster, tracker, display, state)
    if state.warm_steps > 0 and state.step == 0:
        await scores.measure("after_warm_start", 0)
        newest = await _serve(
            cluster
        )  # empty caches: a run that is resumed here, with its row measured, finds them so
    scores.forget("after_rl")
    state = await _reinforce(preparation, cluster, tracker, display, state, newest, recorder)
    if (
        state.step > 0
    ):  # with train.steps=0 there was no RL, and a row of that name would measure the same weights again
        await scores.measure("after_rl", state.step)
    scores.report(state.rewards)
    return state


async def _warm_start(
    preparation: Preparation, cluster: TrainingCluster, tracker: Tracker, display: Display, state: TrainState
) -> tuple[TrainState, ObjectStoreWeights | None]:
    """The supervised stage and its broadcast; the workers then serve its result."""
    demonstrations = build_demonstrations(preparation)
    if demonstrations is None:
        return state, None
    steps = preparation.config.warm_start.steps
    with display.counting("warm start", steps) as counter:
        await warm_start(demonstrations, cluster.learner, preparation.config, tracker, counter.advance)
    weights = await _serve(cluster)
    state = replace(state, warm_steps=steps, version=cluster.learner.version)
    await save_state(preparation, cluster.learner, state)
    return state, weights


async def _serve(cluster: TrainingCluster) -> ObjectStoreWeights:
    """Every worker loads the learner's present weights."""
    weights = await asyncio.to_thread(cluster.channel.publish, cluster.learner)
    async with asyncio.TaskGroup() as refreshes:
        for worker in cluster.workers:
            refreshes.create_task(worker.refresh(weights))
    return weights


async def _reinforce(
    preparation: Preparation,
    cluster: TrainingCluster,
    tracker: Tracker,
    display: Display,
    state: TrainState,
    newest: ObjectStoreWeights | None,
    recorder: EpisodeRecorder,
) -> TrainState:
    """The RL stage. Afterwards ``cluster.workers`` are those that are left: some may have been replaced."""
    plan, rollout = preparation.config.train, preparation.config.rollout
    wanted = WantedWorkers(rollout.workers, rollout.schedule, preparation.run_dir, state.step)
    with display.counting("train step", max(0, plan.steps - state.step)) as counter:

        def on_step(summary: StepSummary, batch: Batch) -> None:
            wanted.step = summary.step
            recorder.on_batch(preparation.config, summary.step, batch)
            keeper.on_step(summary.step)
            counter.advance(step_line(summary))

        def serving() -> list[RemoteWorker]:
            return [worker for worker in cluster.launched if worker in fleet.workers]

        def evaluating() -> list[EpisodeSource]:
            return recorder.watch(serving(), preparation.config, wanted.step)

        stream = build_stream(preparation, cluster.workers, state)
        stream.watch(lambda summary: recorder.on_failures(preparation.config, wanted.step + 1, summary))
        fleet = build_fleet(preparation, cluster, newest, wanted, display.say)
        row = evaluation_rows(preparation.config)["after_rl"]
        keeper = Keeper(preparation, cluster.learner, stream, fleet, tracker, display, row, evaluating)
        parts = LoopParts(
            stream, cluster.learner, fleet, cluster.channel, tracker, on_step, keeper.on_checkpoint
        )
        try:
            state = await run_loop(parts, plan, state)
        finally:
            display.say(ledger_line(stream.ledger))
        cluster.workers[:] = serving()
        return state


def _show_failures(display: Display, rows: Sequence[RowResult]) -> None:
    for row in rows:
        for message in sorted(set(row.failed))[:3]:
            display.say(f"{row.label}: {row.failed.count(message)} episode(s) failed: {message}")


def track(preparation: Preparation) -> Tracker:
    """The tracked run of a training, new or the one that goes on. Raises TrackingError."""
    config = preparation.config
    tracker = start_tracking(
        config,
        preparation.output_dir,
        preparation.run_dir.name,
        preparation.config_path,
        preparation.tracking_run_id,
    )
    note_run_id(preparation.run_dir, tracker.run_id)  # now: the first checkpoint may be hours away
    tracker.dataset(dataset_values(config.environment, "training"))
    tracker.dataset(dataset_values(config.environment, "evaluation"))
    return tracker


@contextmanager
def registered(tracker: Tracker, preparation: Preparation) -> Iterator[None]:
    """However the run ends, what it has kept by then is registered."""
    try:
        yield
    finally:
        for values in kept_models(preparation.config, preparation.run_dir):
            tracker.model(values)


@contextmanager
def ending(tracker: Tracker, display: Display) -> Iterator[None]:
    """End the tracked run with the right status, also when it failed or was stopped. What the tracker warns of goes to the user's display."""
    status: RunStatus = "FAILED"
    handler = _Say(display)
    logging.getLogger("cluster").addHandler(handler)
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, asyncio.CancelledError):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
        logging.getLogger("cluster").removeHandler(handler)


class _Say(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._display.say(record.getMessage())
        except OSError:  # the terminal is gone; who warns need not know
            self.handleError(record)


@contextmanager
def resumable(preparation: Preparation, display: Display) -> Iterator[None]:
    """Tell the user of a training run that broke or was stopped what is saved and how to go on."""
    try:
        yield
    except BaseException:
        saved = list_checkpoints(preparation.run_dir)
        display.say(
            f"saved: {saved[-1]}"
            if saved
            else f"no checkpoint was saved; the rows measured so far are in {preparation.run_dir}"
        )
        display.say(
            f"to go on: python -m cluster train {preparation.config_path} resume={saved[-1] if saved else 'auto'}"
        )
        raise


def say_next(preparation: Preparation, display: Display) -> None:
    """The commands that go on from a run that is done."""
    saved, config = list_checkpoints(preparation.run_dir), preparation.config
    if (best := best_checkpoint(preparation.run_dir)) is not None:
        display.say(f"best:     {best} (held-out F1 {100 * (score_of(best) or 0.0):.1f} %)")
    if saved:
        steps, tasks = max(1, config.train.steps) * 2, config.evaluation.tasks * 4
        display.say(
            f"train on: python -m cluster train {preparation.config_path} resume={saved[-1]} train.steps={steps}"
        )
        display.say(
            f"evaluate: python -m cluster evaluate {preparation.config_path} checkpoint={saved[-1]} evaluation.tasks={tasks}"
        )
