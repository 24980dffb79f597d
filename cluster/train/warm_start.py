"""The supervised stage before reinforcement learning: a small model learns to write parsable flashcards.

    train tasks, never held-out ones --> demonstrations: segments of an ideal agent --> warm_start_step

Off unless ``warm_start.steps > 0``. It has a progress bar, metrics (warm_start/...) and a row in the final
table. Its tasks come from the train split under another seed, so that an unlimited environment never gives
them to the RL stage again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeGuard

from actors.environments.base import Environment
from actors.episodes.demonstration import DemonstratingEnvironment, demonstrate
from actors.episodes.episode import derived_seed
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import Segment
from cluster.common.tasks import TaskSource
from cluster.tracking.tracker import Tracker
from cluster.train.metrics import warm_start_metrics
from configs.schema import RunConfig
from learner.types import WarmStartReport


class SupervisedTrainer(Protocol):
    """What the stage asks of the learner."""

    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        """Blocks, with a deadline of its own."""
        ...


class Demonstrations:
    """Supervised segments by step: step and seed alone determine them."""

    def __init__(self, config: RunConfig, environment: DemonstratingEnvironment, model_path: Path) -> None:
        from transformers import AutoTokenizer

        self._config, self._environment = config, environment
        self._chat = ChatFormat(AutoTokenizer.from_pretrained(model_path))
        self._tasks = TaskSource(environment, "train", derived_seed(config.seed, "warm start"))

    def of_step(self, step: int) -> list[Segment]:
        """The segments of ``warm_start.tasks_per_step`` tasks. Raises TaskError."""
        per_step = self._config.warm_start.tasks_per_step
        tasks = [self._tasks.at(position) for position in range(step * per_step, (step + 1) * per_step)]
        memory, write = self._config.memory, self._config.write
        return [
            segment
            for task in tasks
            for segment in demonstrate(task, self._environment, self._chat, memory, write)
        ]


def can_demonstrate(environment: Environment) -> TypeGuard[DemonstratingEnvironment]:
    """Whether the environment can teach a warm start."""
    return hasattr(environment, "demonstrate_flashcards")


def require_demonstrations(config: RunConfig, environment: Environment) -> None:
    """Raise TaskError when the config asks for a warm start and the environment cannot teach one."""
    if config.warm_start.steps > 0 and not can_demonstrate(environment):
        raise TaskError(
            f"warm_start.steps={config.warm_start.steps} is not possible: {environment.name} has no "
            "demonstrations; set warm_start.steps=0"
        )


async def warm_start(
    demonstrations: Demonstrations,
    trainer: SupervisedTrainer,
    config: RunConfig,
    tracker: Tracker,
    on_step: Callable[[str], None],
) -> None:
    """Run the stage; ``on_step`` is given a line for each step. Raises LearnerError, TaskError."""
    for step in range(config.warm_start.steps):
        segments = await asyncio.to_thread(demonstrations.of_step, step)
        report = await asyncio.to_thread(trainer.warm_start_step, segments, config.warm_start.learning_rate)
        tracker.log(warm_start_metrics(report), step + 1)
        on_step(f"loss {report.loss:.3f} nats a token")
