"""Tasks by position: what lets a resumed run go on at the very task where it was."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from actors.environments.base import Environment, Split
from actors.protocols import TaskError
from actors.types import Task


class TaskSource:
    """Random access over ``environment.tasks``. A finite split starts again at its end; position and seed alone determine the task."""

    def __init__(self, environment: Environment, split: Split, seed: int) -> None:
        self._environment = environment
        self._split = split
        self._seed = seed
        self._count: int | None = None  # of a finite split, known once its end was met

    def at(self, position: int) -> Task:
        """Raises TaskError for an empty split."""
        task = next(self._tasks(self._wrapped(position)), None)
        if task is not None:
            return task
        self._count = sum(1 for _ in self._tasks(0))
        if self._count == 0:
            raise TaskError(f"{self._environment.name} has no task in its {self._split} split")
        return next(self._tasks(self._wrapped(position)))

    def first(self, count: int) -> list[Task]:
        """The first ``count`` tasks, fewer when the split has fewer. Raises TaskError for an empty split."""
        tasks = list(islice(self._tasks(0), count))
        if not tasks:
            raise TaskError(f"{self._environment.name} has no task in its {self._split} split")
        return tasks

    def _wrapped(self, position: int) -> int:
        return position if self._count is None else position % self._count

    def _tasks(self, start: int) -> Iterator[Task]:
        return self._environment.tasks(self._split, self._seed, start)
