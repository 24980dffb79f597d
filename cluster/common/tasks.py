"""Tasks by position: a resumed run goes on with the task at which it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from actors.environments.base import Environment, Split
from actors.protocols import TaskError
from actors.types import Task


class TaskSource:
    """Random access to ``environment.tasks``. A finite split repeats.

    Position and seed alone determine the task.
    """

    def __init__(self, environment: Environment, split: Split, seed: int) -> None:
        self._environment = environment
        self._split = split
        self._seed = seed
        self._count: int | None = None  # tasks of a finite split, known once its end was met

    def at(self, position: int) -> Task:
        """Get the task at ``position``. Raises TaskError for an empty split."""
        wrapped = position if self._count is None else position % self._count
        task = next(self._tasks(wrapped), None)
        if task is None:
            self._count = sum(1 for _ in self._tasks(0))
            if self._count == 0:
                raise self._empty()
            task = next(self._tasks(position % self._count))
        return task

    def first(self, count: int) -> list[Task]:
        """Get the first ``count`` tasks, fewer if there are fewer. Raises TaskError for an empty split."""
        tasks = list(islice(self._tasks(0), count))
        if not tasks:
            raise self._empty()
        return tasks

    def _empty(self) -> TaskError:
        return TaskError(f"{self._environment.name} has no task in its {self._split} split")

    def _tasks(self, start: int) -> Iterator[Task]:
        return self._environment.tasks(self._split, self._seed, start)
