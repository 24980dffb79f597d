"""What the adapters share: a package that may be missing, seeded tasks, and episodes of steps."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from actors.environments.base import Observation, Split, task_seed
from actors.protocols import TaskError
from actors.types import Outcome, Task


def package(name: str, module: str) -> Any:
    """Import the package of the environment ``name``. Raises TaskError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        cure = "pip install 'engram-rl[environments]', also on the cluster's nodes"
        raise TaskError(f"environment.name={name}: {missing} is not installed here: {cure}") from error


def seeded_tasks(name: str, split: Split, seed: int, start: int) -> Iterator[Task]:
    """Endless tasks that differ in their seed alone."""
    for position in itertools.count(start):
        yield Task(f"{name}-{split}-{seed}-{position}", name, {}, task_seed(split, seed, position))


def as_text(whom: str, value: object, cure: str) -> str:
    """``value``, which must be a text. Raises TaskError."""
    if isinstance(value, str):
        return str(value)
    raise TaskError(f"{whom} gave an observation of type {type(value).__name__}, it must be a text: {cure}")


@contextmanager
def closed_after_a_fault(close: Callable[[], object]) -> Iterator[None]:
    """Call ``close`` where the block raises. A fault of its own is not told: the first is the one to know."""
    try:
        yield
    except BaseException:
        with suppress(Exception, SystemExit):  # the user's code
            close()
        raise


class SteppedSession:
    """An episode that asks for an action after each observation. Subclasses add ``act`` and ``close``.

    What the environment shows after the last step is not read: nobody acts on it any more.
    """

    def __init__(self, first: str) -> None:
        self.question = first
        self.parts: dict[str, float] = {"steps": 0.0, "finished": 0.0}
        self._text: str | None = first
        self._total = 0.0

    def observe(self) -> Observation | None:
        return None if self._text is None else Observation(self._text, wants_action=True)

    def stepped(self, text: str | None, reward: float) -> None:
        """Take the result of a step: what the agent reads next, None at the end."""
        self._text = text
        self._total += reward
        self.parts["steps"] += 1
        self.parts["finished"] = float(text is None)

    def outcome(self) -> Outcome:
        return Outcome(self._total, self.parts, ())
