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
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from actors.environments.base import Abstainer, Environment, Rephraser
from actors.episodes.demonstration import DemonstratingEnvironment, demonstrate, demonstrate_exchange
from actors.episodes.episode import derived_seed
from actors.protocols import TaskError
from actors.text.chat_template import open_chat
from actors.types import Segment, Task
from cluster.common.tasks import TaskSource
from cluster.tracking.tracker import Tracker
from cluster.train.metrics import warm_start_metrics
from configs.schema import RunConfig
from configs.user_code import owned
from learner.types import WarmStartReport


class SupervisedTrainer(Protocol):
    """What the stage asks of the learner."""

    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        """Blocks, with a deadline of its own."""
        ...


class Demonstrations:
    """Supervised segments by step: step, seed and purpose alone determine them.

    A task that cannot be demonstrated teaches nothing: ``faults`` has its message.
    """

    def __init__(
        self,
        config: RunConfig,
        environment: DemonstratingEnvironment,
        model_path: Path,
        purpose: str = "warm start",
    ) -> None:
        self._config, self._environment = config, environment
        self.faults: list[str] = []
        self._chat = open_chat(model_path, config.model)
        self._tasks = TaskSource(environment, "train", derived_seed(config.seed, purpose))
        self._unknown = TaskSource(environment, "train", derived_seed(config.seed, purpose, "unknown"))

    def of_step(self, step: int) -> list[Segment]:
        """The flashcards of ``tasks_per_step`` tasks, then the answers of ``unknown``.

        Raises TaskError where the tasks of this step all fail.
        """
        warm = self._config.warm_start
        before = len(self.faults)
        segments = self._taught(self._flashcards, _of_step(self._tasks, step, warm.tasks_per_step))
        if isinstance(self._environment, Abstainer):
            segments += self._taught(self._answers, _of_step(self._unknown, step, warm.unknown))
        faults = self.faults[before:]
        if not segments and faults:
            raise TaskError(f"all {len(faults)} tasks of a warm start's step failed, the first: {faults[0]}")
        return segments

    def _taught(self, segments_of: Callable[[Task], list[Segment]], tasks: Sequence[Task]) -> list[Segment]:
        taught: list[Segment] = []
        for task in tasks:
            try:
                taught += segments_of(task)
            except TaskError as error:
                self.faults.append(str(error))
        return taught

    def _flashcards(self, task: Task) -> list[Segment]:
        config = self._config
        window, limit_s = config.engine.max_model_tokens, config.rollout.environment_timeout_s
        return demonstrate(task, self._environment, self._chat, config.memory, config.write, window, limit_s)

    def _answers(self, task: Task) -> list[Segment]:
        """A question that nothing told, and the same told."""
        environment: Any = self._environment  # an Abstainer
        show, prompt = environment.demonstrate_unknown, task.system_prompt or environment.system_prompt
        if task.fault:
            raise TaskError(task.fault)
        with owned(
            f"task {task.id}: the environment {task.environment}'s demonstrate_unknown", TaskError, show
        ):
            return [
                demonstrate_exchange(exchange, prompt, self._chat, self._config.memory)
                for exchange in show(task)
            ]


def _of_step(tasks: TaskSource, step: int, per_step: int) -> list[Task]:
    return [tasks.at(position) for position in range(step * per_step, (step + 1) * per_step)]


def can_demonstrate(environment: Environment) -> TypeGuard[DemonstratingEnvironment]:
    """Whether the environment can teach a warm start."""
    return hasattr(environment, "demonstrate_flashcards")


def require_demonstrations(config: RunConfig, environment: Environment) -> None:
    """Raise TaskError when the config asks for a warm start that the environment cannot teach."""
    warm, name, supervised = config.warm_start, environment.name, config.train.control == "supervised"
    if warm.steps == 0 and not supervised:
        return
    if not can_demonstrate(environment):
        asked, off = f"warm_start.steps={warm.steps}", "warm_start.steps=0"
        if supervised:
            asked, off = "train.control=supervised", "train.control=none and warm_start.steps=0"
        raise TaskError(f"{asked} is not possible: {name} has no demonstrations; set {off}")
    if warm.unknown > 0 and not isinstance(environment, Abstainer):
        raise TaskError(
            f"warm_start.unknown={warm.unknown} is not possible: {name} demonstrates no question that "
            "nobody told the answer of; set warm_start.unknown=0"
        )
    if config.memory.wordings > 1 and not isinstance(environment, Rephraser):
        raise TaskError(
            f"memory.wordings={config.memory.wordings} is not possible with a warm start: {name} "
            "demonstrates flashcards in one wording; set memory.wordings=1, or warm_start.steps=0"
        )


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
        faults = demonstrations.faults
        figures = {**warm_start_metrics(report), "warm_start/failed_tasks": float(len(faults))}
        tracker.log(figures, logged_from + step + 1)
        failed = f", {len(faults)} task(s) failed so far: {faults[-1]}" if faults else ""
        on_step(f"loss {report.loss:.3f} nats a token{failed}")
