"""The supervised stage before reinforcement learning: a small model learns to write parsable flashcards.

    train tasks, never held-out ones --> demonstrations: segments of an ideal agent --> warm_start_step

With ``warm_start.unknown`` it also learns to say that it does not know, and to answer where it was told.

Off unless ``warm_start.steps > 0``. It has a progress bar, metrics (warm_start/...) and a row in the final
table. Its tasks come from the train split under another seed, so that an unlimited environment never gives
them to the RL stage again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from actors.types import Segment
from cluster.tracking.tracker import Tracker
from cluster.train.demonstrations import Demonstrations
from cluster.train.metrics import warm_start_metrics
from configs.schema import RunConfig
from learner.types import WarmStartReport


class SupervisedTrainer(Protocol):
    """What the stage asks of the learner."""

    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        """Blocks, with a deadline of its own."""
        ...


async def warm_start(
    demonstrations: Demonstrations,
    trainer: SupervisedTrainer,
    config: RunConfig,
    tracker: Tracker,
    on_step: Callable[[str], None],
    steps: range,
    logged_from: int = 0,
) -> None:
    """Make the ``steps``; ``on_step`` is given a line for each. Raises LearnerError, TaskError.

    Tasks that cannot be demonstrated are counted and said. ``logged_from``: the step of the tracker's figures
    before the first of all.
    """
    for step in steps:
        segments = await asyncio.to_thread(demonstrations.of_step, step)
        report = await asyncio.to_thread(trainer.warm_start_step, segments, config.warm_start.learning_rate)
        tracker.log(warm_start_metrics(report, demonstrations.figures()), logged_from + step + 1)
        on_step(", ".join(filter(None, (f"loss {report.loss:.3f} nats a token", demonstrations.note()))))
