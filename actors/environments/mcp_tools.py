"""Questions that an agent answers with the tools of MCP servers (modelcontextprotocol.io).

    question:  "What does a lamp cost?"
    reply:     <tool_call>{"name": "price", "arguments": {"item": "lamp"}}</tool_call>   -> the tool is called
    tool turn: "12 crowns"                                                              -> read, remembered
    question:  "What does a lamp cost?" and the turns that are left
    reply:     "12 crowns"                                                              -> the answer: the end

A reply with calls is a turn; one without is the answer. Records, splits and scores are those of
environment.name=records. A call that the tool refuses gives the model the tool's words. A server that is late
or gone fails the episode.

Our choices. *The question stands below the results again*, as in search.py: a memory may clear the context
between any two turns. environment.mcp.repeat_question=false leaves it out. Two results are two turns of the
tool, also where a template would put them into one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from actors.environments.base import Observation
from actors.environments.records import RecordsEnvironment, scored_answer
from actors.environments.tool_servers import ToolServers
from actors.environments.user_calls import run_blocking
from actors.text.thoughts import visible_reply
from actors.text.tools import Tool, ToolCall, calls_in
from actors.types import Outcome, Task
from configs.schema import McpConfig
from configs.tool_servers import tool_servers

_MOST_CALLS = 8  # in one reply: a model that repeats itself writes hundreds


class McpEnvironment(RecordsEnvironment):
    """The `mcp` task source. An episode has servers of its own: what its calls change, no sibling sees."""

    name = "mcp"
    prompt = "Use the tools to find what you do not know. Then answer the question in a few words."
    needs_texts = False

    def __init__(self, config: McpConfig) -> None:
        """Starts no server. Raises TaskError for the file of tasks."""
        super().__init__(config)
        self._config = config

    def prepare(self) -> None:
        """Start and end each server once: what is wrong with one shows before the first episode."""

        async def check() -> None:
            servers = self._servers()
            await servers.open()
            await servers.close()

        run_blocking(check())

    def start(self, task: Task) -> Any:
        """An awaitable McpSession. Raises TaskError where a server does not start."""
        return self._started(task)

    async def _started(self, task: Task) -> McpSession:
        servers = self._servers()
        await servers.open()
        return McpSession(task, servers, self._config)

    def _servers(self) -> ToolServers:
        return ToolServers(tool_servers(self._config.servers), self._config.timeout_s)


class McpSession:
    """One episode: the record's texts, if it has some, then the question, calls and results in turn."""

    def __init__(self, task: Task, servers: ToolServers, config: McpConfig) -> None:
        self.question: str = task.payload["question"]
        self._task, self._servers, self._config = task, servers, config
        self._turns = self._calls = self._errors = self._malformed = 0
        self._answer: str | None = None
        texts = [Observation(text, wants_action=False) for text in task.payload["texts"]]
        self._next = deque([*texts, Observation(self.question, wants_action=True, tells=False)])

    @property
    def tools(self) -> Sequence[Tool]:
        return self._servers.tools

    def observe(self) -> Observation | None:
        return self._next.popleft() if self._next else None

    async def act(self, text: str) -> None:
        self._turns += 1
        reply = visible_reply(text).strip()
        calls = calls_in(reply, [tool.name for tool in self.tools])
        if not calls:
            self._answer = reply
            return
        results = [await self._run(call) for call in calls[:_MOST_CALLS]]
        if len(calls) > _MOST_CALLS:
            self._malformed += 1
            results.append(f"Only the first {_MOST_CALLS} calls of a reply are run.")
        left = self._config.max_turns - self._turns
        if left > 0:
            self._tell(results, left)

    async def close(self) -> None:
        await self._servers.close()

    def outcome(self) -> Outcome:
        answer = scored_answer(self._task, self._answer or "")
        parts = {
            **answer.scores,
            "tool_calls": float(self._calls),
            "tool_errors": float(self._errors),
            "malformed_calls": float(self._malformed),
            "well_formed": float(self._malformed == 0),
            "unanswered": float(self._answer is None),
        }
        return Outcome(reward=answer.scores["f1"], reward_parts=parts, answers=(answer,))

    def _tell(self, results: Sequence[str], left: int) -> None:
        repeats = self._config.repeat_question
        self._next += [
            Observation(result, wants_action=not repeats and number == len(results), role="tool")
            for number, result in enumerate(results, start=1)
        ]
        if repeats:
            form = f"Turns left: {left}." if left > 1 else "This is the last turn: answer now."
            self._next.append(Observation(f"Question: {self.question}\n{form}", True, tells=False))

    async def _run(self, call: ToolCall) -> str:
        """What the tool gave, or why it was not called. Raises TaskError where its server is gone."""
        names = [tool.name for tool in self.tools]
        fault = call.fault
        if not fault and call.name not in names:
            fault = f"there is no tool {call.name}; there are {', '.join(names)}"
        if fault:
            self._malformed += 1
            return f"Not called: {fault}."
        self._calls += 1
        result = await self._servers.call(call.name, call.arguments)
        self._errors += result.is_error
        limit = self._config.max_result_characters
        text = result.text if len(result.text) <= limit else f"{result.text[:limit]}..."
        return text.strip() or "(nothing)"
