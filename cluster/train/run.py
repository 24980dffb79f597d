"""The story of one run, told in order: evaluate, warm start, train, evaluate, report.

    memory off | TMEM before --> [warm start --> TMEM after warm start] --> loop --> TMEM after RL
               --> its controls --> report

First the story, then what frames it: the tracked run, its end, and what the user hears of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cluster.common.display import Display
from cluster.common.errors import AllFinished, UnloadableError, WeightsLost
from cluster.common.folders import output_folder
from cluster.common.ray_job import current_job, note_run
from cluster.fleet.ledger import ledger_line
from cluster.inspection.recorder import recording
from cluster.measure.rows import EpisodeSource
from cluster.measure.scores import mean_text
from cluster.runs.checkpoint import (
    TrainState,
    best_checkpoint,
    kept_models,
    list_checkpoints,
    prune,
    score_of,
)
from cluster.runs.mirror import mirrored
from cluster.runs.resume import names_a_checkpoint, note_run_id
from cluster.runs.run_folders import mark_finished, mark_unfinished, runs_of
from cluster.runs.run_lock import held
from cluster.runs.wanted_workers import forget_wanted
from cluster.tracking.figure_file import FigureFile
from cluster.tracking.registry import dataset_values
from cluster.tracking.tracker import RunStatus, Tracker, start_tracking
from cluster.train.build import TrainingCluster, build_demonstrations, build_loop, training_cluster
from cluster.train.demonstrations import Demonstrations, warm_start
from cluster.train.loop import as_learner_lost, run_loop, unless_stopped
from cluster.train.prepare import RunFolder, RunSpec, Start, prepare_training, write_config
from cluster.train.report import CONTROLS
from cluster.train.scoreboard import EVALUATE, Observers, Scoreboard
from cluster.train.step_checkpoints import save_state
from configs.mixture import environments
from configs.schema import RunConfig
from learner.types import LearnerLost

_WARM, _STEP = "warm start", "train step"
_log = logging.getLogger(__name__)


def train_config(config: RunConfig, display: Display) -> None:
    """The command ``train``. A checkpoint that cannot be loaded is passed over, unless ``resume`` names it.

    Raises ClusterError and what ``prepare_training`` raises.
    """
    refused: list[Path] = []
    while True:
        try:
            with _told(display):
                prepared = prepare_training(config, refused, display.say)
            asyncio.run(train(*prepared, display))
        except AllFinished as nothing:
            display.say(str(nothing))
            _store_the_rest(config, display)
        except UnloadableError as error:
            if names_a_checkpoint(config.resume):
                raise
            display.say(f"resume={config.resume} passes over a checkpoint: {error}")
            refused.append(error.folder)
            continue
        return


def _store_the_rest(config: RunConfig, display: Display) -> None:
    """Put into the store what the newest run could not put there when it ended."""
    for run_dir in runs_of(output_folder(config), config.name)[:1]:
        with held(run_dir), mirrored(config, run_dir, display.say):
            pass


async def train(spec: RunSpec, folder: RunFolder, start: Start, display: Display) -> None:
    """One training, from its start to its end.

    Raises ClusterError, LearnerError; the user has been told then what is saved and how to go on.
    """
    with held(folder.path), mirrored(spec.config, folder.path, display.say) as saved:
        folder = replace(folder, saved=saved)
        mark_unfinished(folder.path)
        write_config(spec, folder)
        forget_wanted(folder.path)
        with _told(display):
            tracker = _track(spec.config, folder, start)
        with (
            ending(tracker, display),
            _registered(spec.config, folder, tracker),
            _resumable(folder, display),
        ):
            workers, ranks = spec.config.rollout.workers, spec.config.learner.workers
            display.say(f"starting {workers} rollout worker(s) and {ranks} learner rank(s): {folder.path}")
            async with training_cluster(spec, folder, start, display.say) as cluster:
                await note_run(current_job(os.environ), tracker.run_id)
                await train_on(cluster, spec, folder, start, tracker, display)
            mark_finished(folder.path, spec.config.train.steps)
            prune(folder.path, spec.config.train.keep_checkpoints)  # nobody reads the others any longer
            _say_next(spec.config, folder, display)


async def train_on(
    cluster: TrainingCluster,
    spec: RunSpec,
    folder: RunFolder,
    start: Start,
    tracker: Tracker,
    display: Display,
) -> TrainState:
    """Run all stages on a cluster that is up. Afterwards the workers serve the last version."""
    with recording(spec.config, folder.path, spec.model_path, tracker.run_id) as recorder:
        return await _stages(cluster, spec, folder, start, Observers(tracker, display, recorder))


async def _stages(
    cluster: TrainingCluster, spec: RunSpec, folder: RunFolder, start: Start, observers: Observers
) -> TrainState:
    scores = Scoreboard(spec, folder, observers)
    state = replace(start.state, tracking_run_id=observers.tracker.run_id)
    scores.forget("after_rl", *CONTROLS)  # of before a resume, where the run now goes further
    observers.display.expect(_expected(spec.config, start, scores))
    if start.checkpoint is None:
        await scores.measure("memory_off", 0, cluster.crew.seats)
        await scores.measure("before", 0, cluster.crew.seats)
        state = await _warm_start(cluster, spec, folder, state, observers)
    if state.warm_steps > 0 and state.step == 0:
        await scores.measure("after_warm_start", 0, cluster.crew.seats)

        async def served(state: TrainState) -> TrainState:
            await _serve_newest(cluster)
            return state

        # Empties the caches: a run that is resumed here, with its row measured, begins with empty ones too.
        state = await _recovered(cluster, served, state)
    state, workers = await _reinforce(cluster, spec, folder, state, observers)
    if state.step > 0:  # with train.steps=0 the row would measure the same weights again
        await scores.measure("after_rl", state.step, workers)
    for control in CONTROLS:  # of the policy that the run ends with
        await scores.measure(control, state.step, workers)
    scores.report(state)
    return state


def _expected(config: RunConfig, start: Start, scores: Scoreboard) -> dict[str, int]:
    """How much of each kind of work is ahead: what the time left of the whole run is told by."""
    at_start = start.checkpoint is None
    warm = config.warm_start.steps if at_start else 0
    first = ("memory_off", "before") if at_start else ()
    warmed = ("after_warm_start",) if warm or (start.state.warm_steps and start.state.step == 0) else ()
    last = (("after_rl",) if config.train.steps else ()) + CONTROLS
    return {
        EVALUATE: scores.ahead((*first, *warmed, *last)),
        _WARM: warm,
        _STEP: max(0, config.train.steps - start.state.step),
    }


async def _warm_start(
    cluster: TrainingCluster, spec: RunSpec, folder: RunFolder, state: TrainState, observers: Observers
) -> TrainState:
    """The supervised stage, if there is one. The workers then serve its result, which is saved."""
    config, steps = spec.config, spec.config.warm_start.steps
    if steps == 0:
        return state

    async def stage(state: TrainState) -> TrainState:
        demonstrations = build_demonstrations(spec, "warm start")
        with observers.display.counting(_WARM, steps, _WARM) as counter:
            await warm_start(
                demonstrations, cluster.learner, config, observers.tracker, counter.advance, range(steps)
            )
        _summarize("warm start", demonstrations, observers)
        await _serve_newest(cluster)
        state = replace(state, warm_steps=steps, version=cluster.learner.version)
        await save_state(folder, config, cluster.learner, state)
        return state

    return await _recovered(cluster, stage, state)


async def _recovered(
    cluster: TrainingCluster, stage: Callable[[TrainState], Awaitable[TrainState]], state: TrainState
) -> TrainState:
    """Run a supervised ``stage`` from ``state``; after a loss of the learner again, from its checkpoint."""
    while True:
        try:
            return await stage(state)
        except (LearnerLost, WeightsLost) as error:
            unless_stopped(error)
            state, _ = await asyncio.to_thread(cluster.recovery.restart, as_learner_lost(error), state)


async def _supervise(
    cluster: TrainingCluster, spec: RunSpec, folder: RunFolder, state: TrainState, observers: Observers
) -> tuple[TrainState, Sequence[EpisodeSource]]:
    """The control in the place of RL: supervised steps on fresh tasks, saved every train.checkpoint_every.

    An interrupt loses the steps since then. There is no evaluation between the steps.
    """
    config, last, every = spec.config, spec.config.train.steps, spec.config.train.checkpoint_every
    if state.step >= last:
        return state, cluster.crew.seats
    demonstrations = build_demonstrations(spec, "supervised control")
    learner, tracker = cluster.learner, observers.tracker

    async def stage(state: TrainState) -> TrainState:
        with observers.display.counting("supervised step", last - state.step, _STEP) as counter:
            for begin in range(state.step, last, every):
                steps = range(begin, min(begin + every, last))
                await warm_start(
                    demonstrations, learner, config, tracker, counter.advance, steps, config.warm_start.steps
                )
                state = replace(state, step=steps.stop, version=learner.version)
                await save_state(folder, config, learner, state)
        _summarize("supervised steps", demonstrations, observers)
        await _serve_newest(cluster)
        return state

    return await _recovered(cluster, stage, state), cluster.crew.seats


def _summarize(stage: str, demonstrations: Demonstrations, observers: Observers) -> None:
    """Say what a teacher gave and which tasks failed. A bar on a terminal has shown it and is gone."""
    if note := demonstrations.note():
        observers.display.say(f"{stage}: {note}")


async def _serve_newest(cluster: TrainingCluster) -> None:
    """Let every worker load the learner's present weights."""
    await cluster.crew.load(await asyncio.to_thread(cluster.channel.publish, cluster.learner))


async def _reinforce(
    cluster: TrainingCluster, spec: RunSpec, folder: RunFolder, state: TrainState, observers: Observers
) -> tuple[TrainState, Sequence[EpisodeSource]]:
    """The RL stage. Returns its last state, and the workers that serve then: some may have been replaced."""
    plan, display = spec.config.train, observers.display
    if plan.control == "supervised":
        return await _supervise(cluster, spec, folder, state, observers)
    with display.counting(_STEP, max(0, plan.steps - state.step), _STEP) as counter:
        parts = build_loop(cluster, spec, folder, state, observers, counter)
        try:
            state = await run_loop(parts, plan, state)
        finally:
            display.say(ledger_line(parts.stream.ledger))
        cluster.crew.adopt(parts.fleet.workers)
        return state, cluster.crew.seats


# --- what frames a run ------------------------------------------------------------------------------------


def _track(config: RunConfig, folder: RunFolder, start: Start) -> Tracker:
    """Open the tracked run of a training: a new one, or that of ``start`` again. Raises TrackingError."""
    run_dir, state = folder.path, start.state
    run_id = "" if _begins_a_branch(config, folder, start) else state.tracking_run_id
    tracker = start_tracking(config, run_dir.parent, run_dir.name, folder.config, run_id, state.step)
    note_run_id(folder.path, tracker.run_id)  # now: the first checkpoint may be hours away
    for environment in environments(config.environment):
        tracker.dataset(dataset_values(environment, "training"))
        tracker.dataset(dataset_values(environment, "evaluation"))
    return FigureFile(tracker, folder.path)


def _begins_a_branch(config: RunConfig, folder: RunFolder, start: Start) -> bool:
    """Whether a user went back to an earlier checkpoint by its name; it is said.

    Its steps get an MLflow run of their own: in the old one each step stays as it was logged first.
    """
    if start.checkpoint is None or not names_a_checkpoint(config.resume):
        return False
    newest = list_checkpoints(folder.path)[-1]
    if start.checkpoint.folder == newest:
        return False
    text = "%s is not the newest checkpoint (%s is): from here on the figures go to a new MLflow run"
    _log.warning(text, start.checkpoint.folder, newest.name)
    return True


@contextmanager
def ending(tracker: Tracker, display: Display) -> Iterator[None]:
    """End the tracked run with the right status, also when it failed or was stopped.

    What the tracker warns of goes to the user's display.
    """
    status: RunStatus = "FAILED"
    with _told(display):
        try:
            yield
            status = "FINISHED"
        except (KeyboardInterrupt, asyncio.CancelledError):
            status = "KILLED"
            raise
        finally:
            tracker.finish(status)


@contextmanager
def _told(display: Display) -> Iterator[None]:
    """Show the warnings of the block to the user."""
    handler = _DisplayHandler(display)
    logging.getLogger("cluster").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("cluster").removeHandler(handler)


class _DisplayHandler(logging.Handler):
    """Shows warnings to the user."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._display.say(record.getMessage())
        except OSError:  # the terminal is gone; the code that warns goes on
            self.handleError(record)


@contextmanager
def _registered(config: RunConfig, folder: RunFolder, tracker: Tracker) -> Iterator[None]:
    """Register the checkpoints that are kept when the run ends, however it ends."""
    try:
        yield
    finally:
        for values in kept_models(config, folder.path):
            tracker.model(values)


@contextmanager
def _resumable(folder: RunFolder, display: Display) -> Iterator[None]:
    """Tell the user of a run that broke or was stopped what is saved and how to go on."""
    try:
        yield
    except BaseException as error:
        refused = error.folder if isinstance(error, UnloadableError) else None
        saved = [checkpoint for checkpoint in list_checkpoints(folder.path) if checkpoint != refused]
        if saved:
            display.say(f"saved: {saved[-1]}")
        else:
            display.say(f"no checkpoint was saved; the rows measured so far are in {folder.path}")
        resume = saved[-1] if saved else "auto"
        display.say(f"to go on: engram train {folder.config} resume={resume}")
        raise


def _say_next(config: RunConfig, folder: RunFolder, display: Display) -> None:
    """Show the commands that go on from a run that is done."""
    saved = list_checkpoints(folder.path)
    if (best := best_checkpoint(folder.path)) is not None and (score := score_of(best)) is not None:
        display.say(f"best:     {best} (held-out {mean_text(*score)})")
    if saved:
        steps, tasks = max(1, config.train.steps) * 2, config.evaluation.tasks * 4
        display.say(f"train on: engram train {folder.config} resume={saved[-1]} train.steps={steps}")
        checkpoint = f"checkpoint={saved[-1]} evaluation.tasks={tasks}"
        display.say(f"evaluate: engram evaluate {folder.config} {checkpoint}")
