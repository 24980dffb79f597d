"""What frames a run however it goes: its tracked run is opened and ended, the user is told what was saved and how to go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.begun import note_run_id
from cluster.checkpoint import best_checkpoint, list_checkpoints, score_of
from cluster.entities import dataset_values, kept_models
from cluster.prepare import Preparation
from cluster.progress import Display
from cluster.tracking import RunStatus, Tracker, start_tracking


def track(preparation: Preparation) -> Tracker:
    """The tracked run of a training, new or the one that goes on. Raises TrackingError."""
    config = preparation.config
    tracker = start_tracking(config, preparation.output_dir, preparation.run_dir.name, preparation.config_path, preparation.tracking_run_id)
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
        display.say(f"saved: {saved[-1]}" if saved else f"no checkpoint was saved; the rows measured so far are in {preparation.run_dir}")
        display.say(f"to go on: python -m cluster train {preparation.config_path} resume={saved[-1] if saved else 'auto'}")
        raise


def say_next(preparation: Preparation, display: Display) -> None:
    """The commands that go on from a run that is done."""
    saved, config = list_checkpoints(preparation.run_dir), preparation.config
    if (best := best_checkpoint(preparation.run_dir)) is not None:
        display.say(f"best:     {best} (held-out F1 {100 * (score_of(best) or 0.0):.1f} %)")
    if saved:
        steps, tasks = max(1, config.train.steps) * 2, config.evaluation.tasks * 4
        display.say(f"train on: python -m cluster train {preparation.config_path} resume={saved[-1]} train.steps={steps}")
        display.say(f"evaluate: python -m cluster evaluate {preparation.config_path} checkpoint={saved[-1]} evaluation.tasks={tasks}")
