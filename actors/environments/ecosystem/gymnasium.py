"""Gymnasium environments whose observations and actions are texts.

    environment:
      name: gymnasium
      gymnasium: {id: "my_rooms:Rooms-v0", make: {rooms: 4}}

A task is a seed: ``reset(seed=...)``. The reward is the sum of the steps' rewards, until the environment
terminates or truncates the episode. What an action means, and whether it is valid, is the environment's
business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actors.environments.base import Split
from actors.environments.ecosystem.stepped import (
    SteppedSession,
    as_text,
    closed_after_a_fault,
    package,
    seeded_tasks,
)
from actors.protocols import TaskError
from actors.text.thoughts import visible_reply
from actors.types import Task
from configs.schema import GymnasiumConfig
from configs.user_code import owned

_CURES = {
    "observation": "wrap it in a gymnasium.ObservationWrapper that words it",
    "action": "wrap it in a gymnasium.ActionWrapper that reads a text",
}


class GymnasiumEnvironment:
    """The `gymnasium` task source."""

    name = "gymnasium"

    def __init__(self, config: GymnasiumConfig) -> None:
        """Raises TaskError where there is no such environment, or it is none of texts."""
        self._gymnasium = package(self.name, "gymnasium")
        self._config = config
        self.system_prompt = config.system_prompt
        self._whom = f"environment.gymnasium.id={config.id}"
        with owned(self._whom, TaskError):
            env = self._make()
            with closed_after_a_fault(env.close):
                spaces = {kind: getattr(env, f"{kind}_space", None) for kind in _CURES}
            env.close()
        for kind, space in spaces.items():
            # an environment may leave its spaces out; then its first observation tells
            if isinstance(space, self._gymnasium.Space) and not isinstance(
                space, self._gymnasium.spaces.Text
            ):
                raise TaskError(f"{self._whom}: its {kind}s are {space}, not texts: {_CURES[kind]}")

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        return seeded_tasks(self.name, split, seed, start)

    def start(self, task: Task) -> GymnasiumSession:
        env = self._make()
        with closed_after_a_fault(env.close):
            first, _ = env.reset(seed=task.seed, options=dict(self._config.reset) or None)
            return GymnasiumSession(env, as_text(self._whom, first, _CURES["observation"]), self._whom)

    def _make(self) -> Any:
        # the checker only warns, of texts with characters that a Text space does not list
        return self._gymnasium.make(self._config.id, **{"disable_env_checker": True, **self._config.make})


class GymnasiumSession(SteppedSession):
    """One episode of one environment object."""

    def __init__(self, env: Any, first: str, whom: str) -> None:
        super().__init__(first)
        self._env, self._whom = env, whom
        self.parts["truncated"] = 0.0

    def act(self, text: str) -> None:
        shown, reward, terminated, truncated, _ = self._env.step(visible_reply(text).strip())
        over = bool(terminated or truncated)
        self.parts["truncated"] = float(bool(truncated) and not terminated)
        self.stepped(None if over else as_text(self._whom, shown, _CURES["observation"]), float(reward))

    def close(self) -> None:
        self._env.close()
