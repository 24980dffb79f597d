"""Tasks by position: a resumed run goes on with the task at which it stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

from actors.environments.base import Environment, Split
from actors.protocols import TaskError
from actors.text.plain_text import encodable
from actors.types import Task
from configs.user_code import owned

_FAULTS_IN_A_ROW = 3  # while the tasks of a finite split are counted


class TaskSource:
    """Random access to ``environment.tasks``. A finite split repeats.

    Position and seed alone determine the task. One that the environment cannot make becomes a Task with its
    ``fault``: it is played, fails and is counted like any other.
    """

    def __init__(self, environment: Environment, split: Split, seed: int) -> None:
        self._environment = environment
        self._split = split
        self._seed = seed
        self._count: int | None = None  # tasks of a finite split, known once its end was met

    def at(self, position: int) -> Task:
        """Get the task at ``position``. Raises TaskError for an empty split."""
        wrapped = position if self._count is None else position % self._count
        task = self._get(wrapped)
        if task is None:
            self._count = self._count_tasks()
            if self._count == 0:
                raise self._empty()
            task = self._get(position % self._count)
        return task or self._faulty(position, "the environment gave another number of tasks than before")

    def first(self, count: int) -> list[Task]:
        """Get the first ``count`` tasks, fewer if there are fewer.

        Raises TaskError for an empty split, and where no task can be made.
        """
        tasks: list[Task] = []
        ended = False
        while len(tasks) < count and not ended:
            try:
                for task in self._tasks(len(tasks)):
                    tasks.append(task)
                    if len(tasks) == count:
                        break
                else:
                    ended = True
            except TaskError as error:
                tasks.append(self._faulty(len(tasks), str(error)))
        if not tasks:
            raise self._empty()
        if all(task.fault for task in tasks):
            raise TaskError(tasks[0].fault)
        return tasks

    def _get(self, position: int) -> Task | None:
        try:
            return next(self._tasks(position), None)
        except TaskError as error:
            return self._faulty(position, str(error))

    def _count_tasks(self) -> int:
        count = faults = 0
        while True:
            try:
                for _ in self._tasks(count):
                    count, faults = count + 1, 0
                return count
            except TaskError:
                count, faults = count + 1, faults + 1
                if faults == _FAULTS_IN_A_ROW:
                    raise

    def _empty(self) -> TaskError:
        return TaskError(f"{self._environment.name} has no task in its {self._split} split")

    def _faulty(self, position: int, fault: str) -> Task:
        name = str(self._environment.name)
        return Task(f"{name}-{self._split}-{self._seed}-{position}", name, {}, 0, fault=fault)

    def _tasks(self, start: int) -> Iterator[Task]:
        """The environment's tasks, each one checked. Raises TaskError with the user's file and line."""
        make = self._environment.tasks
        whom = f"the environment {self._environment.name}'s tasks"
        with owned(whom, TaskError, make):
            tasks = iter(make(self._split, self._seed, start))
        while True:
            with owned(whom, TaskError, make):
                try:
                    task = next(tasks)
                except StopIteration:
                    return
                checked = _checked(task)
            yield checked


def _checked(task: object) -> Task:
    """``task`` if it is one that a worker can get. Raises TypeError, and what copying it raises."""
    if not isinstance(task, Task):
        raise TypeError(f"it gave {type(task).__name__}, not a Task of actors/types.py")
    if not isinstance(task.id, str) or not task.id:
        raise TypeError(f"a task's id is {task.id!r}, it must be a text that is not empty")
    if not isinstance(task.system_prompt, str):
        raise TypeError(f"a task's system_prompt is {type(task.system_prompt).__name__}, it must be a text")
    copy.deepcopy(task.payload)  # as a worker gets it: what cannot travel (a lock, a socket) is named here
    return replace(task, id=encodable(task.id), system_prompt=encodable(task.system_prompt))
