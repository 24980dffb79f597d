"""OpenEnv servers, spoken to in their client protocol: JSON over a WebSocket, one connection an episode.

    environment:
      name: openenv
      openenv: {url: "http://127.0.0.1:8000"}

A task is a seed, sent with ``reset``. The reward is the sum of the steps' rewards, until it says done. An
action that the server's schema refuses is the agent's own fault: it reads why, and may
try again.

Why not OpenEnv's own client: importing it needs fastmcp, which cannot be installed beside vLLM's mcp.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
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
from configs.schema import OpenEnvConfig
from configs.user_code import owned

_ANSWERS_IN_S = 4.0  # the server, before anything starts
_REFUSED = "VALIDATION_ERROR"
_CURE = "name a text field with environment.openenv.observation_field"


class OpenEnvEnvironment:
    """The `openenv` task source."""

    name = "openenv"

    def __init__(self, config: OpenEnvConfig) -> None:
        """Raises TaskError where no server answers, or its fields are none that an agent reads and writes."""
        self._connect = package(self.name, "websockets.sync.client").connect
        self._config = config
        self._whom = f"environment.openenv.url={config.url}"
        self.system_prompt = config.system_prompt
        with owned(self._whom, TaskError):
            address = f"{config.url.rstrip('/')}/schema"
            with urllib.request.urlopen(address, timeout=_ANSWERS_IN_S) as answer:
                schema = json.load(answer)
            action, observation = schema["action"], schema["observation"]
        taken = config.action_field or self._only_text("action", action, action.get("required", []))
        shown = config.observation_field or self._only_text("observation", observation, None)
        self._fields = (taken, shown)

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        return seeded_tasks(self.name, split, seed, start)

    def start(self, task: Task) -> OpenEnvSession:
        address = f"ws{self._config.url.removeprefix('http').rstrip('/')}/ws"
        connect = partial(self._connect, address)
        return OpenEnvSession(connect, self._whom, self._config, self._fields, task.seed)

    def _only_text(self, kind: str, schema: Mapping[str, Any], among: list[str] | None) -> str:
        """The only text field of a schema. Raises TaskError."""
        fields: Mapping[str, Mapping[str, Any]] = schema.get("properties", {})
        texts = [name for name, field in fields.items() if field.get("type") == "string"]
        if among is not None:
            texts = [name for name in texts if name in among]
        if len(texts) == 1:
            return texts[0]
        has = ", ".join(sorted(fields)) or "none"
        raise TaskError(
            f"{self._whom}: its {kind} has {len(texts)} text fields to choose from (all fields: {has}): "
            f"name the right one with environment.openenv.{kind}_field"
        )


class OpenEnvSession(SteppedSession):
    """One episode over one connection, which gives it an environment object of its own in the server."""

    def __init__(
        self,
        connect: Callable[[], Any],
        whom: str,
        config: OpenEnvConfig,
        fields: tuple[str, str],
        seed: int,
    ) -> None:
        self._whom, self._config = whom, config
        self._taken, self._shown = fields
        self._opened = ExitStack()
        with owned(whom, TaskError):
            self._socket = self._opened.enter_context(connect())
        with closed_after_a_fault(self.close):
            super().__init__(self._read(self._ask("reset", {"seed": seed, **config.reset})))
        self.parts["refused"] = 0.0

    def act(self, text: str) -> None:
        result = self._ask("step", {**self._config.action, self._taken: visible_reply(text).strip()})
        if "refusal" in result:
            self.parts["refused"] += 1
            self.stepped(result["refusal"], 0.0)
        else:
            over = bool(result.get("done"))
            self.stepped(None if over else self._read(result), float(result.get("reward") or 0.0))

    def close(self) -> None:
        self._opened.close()

    def _read(self, result: Mapping[str, Any]) -> str:
        return as_text(self._whom, result.get("observation", {}).get(self._shown), _CURE)

    def _ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message; its result, or the refusal of an action. Raises TaskError."""
        from websockets.exceptions import ConnectionClosed

        with owned(f"{self._whom}, {kind}", TaskError):
            with suppress(ConnectionClosed):  # a server that hangs up has said why: that can still be read
                self._socket.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(self._socket.recv())
            result: dict[str, Any] = answer["data"]
        if answer["type"] != "error":
            return result
        said = f"{result.get('code', 'error')}: {result.get('message', '')}"
        if kind == "step" and result.get("code") == _REFUSED:
            faults = "; ".join(str(fault.get("msg", "")) for fault in result.get("errors", []))
            return {"refusal": f"That is no valid action. {faults}".strip()}
        raise TaskError(f"{self._whom}: the server answers {kind} with {said}")
