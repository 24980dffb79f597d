"""What a warm start is taught, and from where: the environment itself, a user's file, or a teacher.

    position --> one of the sources in turn --> demonstration --> segments     (tasks_per_step of them a step)

A file or a teacher takes the place of the environment's own demonstrations, so that any environment has a
start. What a teacher gives is checked, counted and kept (actors/episodes/teacher.py). The tasks come from the
train split under another seed: an unlimited environment never gives them to the RL stage again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from actors.environments.base import Abstainer, Environment, Questioner, Rephraser, passes, prepare
from actors.environments.mixture import playing
from actors.episodes.demonstration import (
    CardsOf,
    DemonstratingEnvironment,
    asked_by_lot,
    demonstrate,
    demonstrate_exchange,
    gold_cards,
)
from actors.episodes.episode import derived_seed
from actors.episodes.teacher import Teacher
from actors.episodes.written_demonstrations import WrittenDemonstrations
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat, open_chat
from actors.types import Segment, Task
from cluster.common.folders import output_folder
from cluster.common.tasks import TaskSource
from cluster.tracking.tracker import Tracker
from cluster.train.metrics import warm_start_metrics
from configs.schema import RunConfig
from configs.user_code import owned
from learner.types import WarmStartReport

_TEACHERS_FOLDER = "teacher"  # in output_dir: runs share what a teacher said
Job = Callable[[], list[Segment]]


class Demonstrations:
    """Supervised segments by step: step, seed and purpose alone determine them (and a teacher's replies).

    A task that cannot be demonstrated teaches nothing: ``faults`` has its message.
    """

    def __init__(
        self, config: RunConfig, environment: Environment, model_path: Path, purpose: str = "warm start"
    ) -> None:
        """Raises TaskError where the file or the teacher's settings cannot be used."""
        self._config, self._environment = config, environment
        self.faults: list[str] = []
        self._chat = open_chat(model_path, config.model)
        self._seed = derived_seed(config.seed, purpose)
        self._tasks = TaskSource(environment, "train", self._seed)
        self._unknown = TaskSource(environment, "train", derived_seed(config.seed, purpose, "unknown"))
        self._file = written_demonstrations(config, environment)
        self._teacher = open_teacher(config, self._chat)
        self._sources: list[Callable[[int], Job]] = []
        if self._file:
            self._sources.append(self._line_at)
        self._plays, self._is_prepared = bool(self._teacher) or not self._file, False
        if self._plays:
            self._sources.append(self._task_at)

    def of_step(self, step: int) -> list[Segment]:
        """The flashcards of ``tasks_per_step`` tasks or lines, then the answers of ``unknown``.

        Raises TaskError where the tasks of this step all fail, or leave nothing to teach.
        """
        if self._plays and not self._is_prepared:
            prepare(self._environment)  # here, apart from the driver's loop: it may be slow
            self._is_prepared = True
        warm, count = self._config.warm_start, len(self._sources)
        before = len(self.faults)
        positions = range(step * warm.tasks_per_step, (step + 1) * warm.tasks_per_step)
        jobs = [self._sources[position % count](position // count) for position in positions]
        if isinstance(self._environment, Abstainer):
            unknown = [self._unknown.at(at) for at in range(step * warm.unknown, (step + 1) * warm.unknown)]
            jobs += [partial(self._answers, task) for task in unknown]
        segments = self._taught(jobs)
        faults = self.faults[before:]
        if not segments and faults:
            raise TaskError(f"all {len(faults)} tasks of a warm start's step failed, the first: {faults[0]}")
        if not segments:
            raise TaskError(self._nothing())
        return segments

    def figures(self) -> dict[str, float]:
        """What went wrong, and what a teacher gave, in counts since the beginning."""
        taught = self._teacher.given.figures() if self._teacher else {}
        return {"failed_tasks": float(len(self.faults))} | {
            f"teacher_{name}": value for name, value in taught.items()
        }

    def note(self) -> str:
        """The same for people: "the teacher gave 40 flashcard(s), 3 dropped: ...". Empty: nothing to say."""
        parts = []
        if self._teacher:
            given, cost = self._teacher.given, self._teacher.given.cost
            parts.append(f"the teacher gave {given.cards} flashcard(s)")
            if given.ungrounded:
                parts.append(f"{given.ungrounded} dropped: their answer is not in their text")
            if given.without_room:
                parts.append(f"{given.without_room} dropped: beyond memory.max_extract_tokens")
            parts.append(f"{cost.requests} request(s), {cost.cached} from the cache")
            parts += [f"{cost.usd:.4f} USD"] if cost.usd else []
        if self.faults:
            parts.append(f"{len(self.faults)} task(s) failed so far: {self.faults[-1]}")
        return ", ".join(parts)

    def _taught(self, jobs: Sequence[Job]) -> list[Segment]:
        """The segments of the jobs, in their order. Those of a teacher wait for it at the same time."""
        at_once = self._config.warm_start.teacher.max_concurrent if self._teacher else 1
        with ThreadPoolExecutor(at_once, "demonstration") as threads:
            results = list(threads.map(_caught, jobs))
        self.faults += [result for result in results if isinstance(result, str)]
        return [segment for result in results if not isinstance(result, str) for segment in result]

    def _line_at(self, position: int) -> Job:
        """A line of the file: all of them, in a new order every pass."""
        file = self._file
        assert file is not None
        _, place = next(passes("demonstrations", len(file.lines), "train", self._seed, position))
        window = self._config.engine.max_model_tokens
        return partial(file.segments, file.lines[place], self._chat, window)

    def _task_at(self, position: int) -> Job:
        task = self._tasks.at(position)
        if self._teacher:
            return partial(self._flashcards, task, self._teacher.cards_of)
        assert can_demonstrate(self._environment), "`require_demonstrations` has checked"
        cards = asked_by_lot if self._config.warm_start.asking == "by_lot" else gold_cards
        return partial(self._flashcards, task, cards(self._environment, task, self._config.memory))

    def _flashcards(self, task: Task, cards_of: CardsOf) -> list[Segment]:
        config, rollout = self._config, self._config.rollout
        return demonstrate(
            task,
            self._environment,
            cards_of,
            self._chat,
            config.memory,
            config.write,
            config.engine.max_model_tokens,
            rollout.environment_timeout_s,
            rollout.max_turns,
        )

    def _answers(self, task: Task) -> list[Segment]:
        """A question that nothing told, and the same told."""
        environment: Any = self._environment  # an Abstainer
        if task.fault:
            raise TaskError(task.fault)
        show = environment.demonstrate_unknown
        prompt = task.system_prompt or playing(environment, task).system_prompt
        whom = f"task {task.id}: the environment {task.environment}'s demonstrate_unknown"
        with owned(whom, TaskError, show):
            return [
                demonstrate_exchange(exchange, prompt, self._chat, self._config.memory)
                for exchange in show(task)
            ]

    def _nothing(self) -> str:
        given = self._teacher.given if self._teacher else None
        if given is not None and given.dropped and not given.cards:
            return (
                f"all {given.dropped} flashcards of the teacher were dropped ({given.ungrounded} answer what "
                "their text does not tell): choose another warm_start.teacher.model"
            )
        most = self._config.memory.max_context_tokens
        return (
            "a warm start's step has nothing to teach: none of its tasks filled a context of "
            f"memory.max_context_tokens={most}, so no flashcards were asked for; lower it"
        )


def _caught(job: Job) -> list[Segment] | str:
    try:
        return job()
    except TaskError as error:
        return str(error)


# --- before a run starts -----------------------------------------------------------------------------------


def can_demonstrate(environment: Environment) -> TypeGuard[DemonstratingEnvironment]:
    """Whether the environment itself can teach a warm start."""
    return hasattr(environment, "demonstrate_flashcards")


def written_demonstrations(config: RunConfig, environment: Environment) -> WrittenDemonstrations | None:
    """The user's own file, if there is one. Raises TaskError: it names file, line and field."""
    path = config.warm_start.demonstrations
    if not path:
        return None
    with owned(f"the environment {environment.name}'s system_prompt", TaskError):
        prompt = str(environment.system_prompt)
    return WrittenDemonstrations(path, config.memory, config.write, prompt)


def open_teacher(config: RunConfig, chat: ChatFormat) -> Teacher | None:
    """The teacher, if there is one. It is asked nothing yet. Raises TaskError."""
    teacher = config.warm_start.teacher
    if not teacher.url:
        return None
    folder = output_folder(config) / _TEACHERS_FOLDER
    kept = replace(teacher, cache_dir=teacher.cache_dir or str(folder))
    return Teacher(kept, config.memory, config.write, chat)


def require_demonstrations(config: RunConfig, environment: Environment) -> None:
    """Raise TaskError when the config asks for a warm start that nothing can teach."""
    warm, name, supervised = config.warm_start, environment.name, config.train.control == "supervised"
    if not is_supervised(config):
        return
    by_itself = not warm.demonstrations and not warm.teacher.url
    if by_itself and not can_demonstrate(environment):
        asked, off = f"warm_start.steps={warm.steps}", "warm_start.steps=0"
        if supervised:
            asked, off = "train.control=supervised", "train.control=none and warm_start.steps=0"
        raise TaskError(
            f"{asked} is not possible: {name} has no demonstrations; set {off}, or give a file of them "
            "(warm_start.demonstrations) or a model that writes them (warm_start.teacher.url)"
        )
    if warm.unknown > 0 and not isinstance(environment, Abstainer):
        raise TaskError(
            f"warm_start.unknown={warm.unknown} is not possible: {name} demonstrates no question that "
            "nobody told the answer of; set warm_start.unknown=0"
        )
    if warm.asking == "by_lot" and not (by_itself and isinstance(environment, Questioner)):
        why = (
            f"{name} has no questions beside a card"
            if by_itself
            else "cards of a file or a teacher have none"
        )
        raise TaskError(
            f"warm_start.asking=by_lot is not possible: {why} to draw from; set warm_start.asking=gold"
        )
    if by_itself and config.memory.wordings > 1 and not isinstance(environment, Rephraser):
        raise TaskError(
            f"memory.wordings={config.memory.wordings} is not possible with a warm start: {name} "
            "demonstrates flashcards in one wording; set memory.wordings=1, or warm_start.steps=0"
        )


def require_sources(config: RunConfig, environment: Environment, chat: ChatFormat) -> None:
    """Check each line of the file, and that the teacher's server is there. Raises TaskError, in seconds."""
    if not is_supervised(config):
        return
    if (file := written_demonstrations(config, environment)) is not None:
        file.require_room(chat, config.engine.max_model_tokens)
    if (teacher := open_teacher(config, chat)) is not None:
        teacher.require_listening()


def is_supervised(config: RunConfig) -> bool:
    """Whether the run has supervised steps."""
    return config.warm_start.steps > 0 or config.train.control == "supervised"


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
