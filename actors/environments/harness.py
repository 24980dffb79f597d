"""A user's own agent harness as an environment: whatever speaks the OpenAI API trains as it is.

    harness (a command or a function) --OpenAI API--> loopback endpoint --Call--> session.observe
             <------------------- the reply <------------------------------------ session.act

The episode's loop is that of every environment: the memory takes in the new turns of a call, extracts and
writes past L_max, and samples the reply. So a harness's trajectory is, token by token, that of a session that
says the same. History is matched, never tokenised again (actors/endpoint/history.py).

The reward is what the harness gives at its end, or its answer against the task's gold answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from actors.endpoint.answers import SaidCall
from actors.endpoint.loopback import Call, Channel, Loopback
from actors.environments.base import Observation, Reply, Split, TurnRole, held_out, passes, task_seed
from actors.environments.data_file import DataFile
from actors.environments.harness_process import Command, Ended, Function, Harness, Running, Visit
from actors.environments.hub_data import is_hub
from actors.environments.scoring import plain_em, plain_f1
from actors.protocols import TaskError
from actors.text.tools import Tool, readable_calls
from actors.types import Answer, Outcome, Task
from configs.schema import HarnessConfig
from configs.user_code import is_path, load_extension, owned

_GOLD = ("answer", "answers", "golden_answers")  # fields of a task with its right answers


class HarnessEnvironment:
    """The `harness` task source."""

    name = "harness"
    system_prompt = ""  # the harness's own

    def __init__(self, config: HarnessConfig) -> None:
        """Raises TaskError and ExtensionError when the tasks or the function cannot be used."""
        function = config.function and load_extension("environment.harness.function", config.function)
        self._harness: Harness = Function(function) if function else Command(config.command)
        self._endpoint = Loopback(config.ignored_fields)
        self._tasks = _tasks(config)

    def prepare(self) -> None:
        """Start the endpoint of this process."""
        self._endpoint.start()

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless for train, a new order every pass; one pass for eval."""
        payloads = self._tasks[split]
        for position, place in passes(self.name, len(payloads), split, seed, start):
            name = f"harness-{split}-{seed}-{position}"
            yield Task(name, self.name, payloads[place], task_seed(split, seed, position))

    async def start(self, task: Task) -> HarnessSession:
        """Start the harness, and wait for its first call. Raises TaskError, and what a function raises."""
        session = HarnessSession(task, self._endpoint, await self._endpoint.open())
        try:
            await session.begin(self._harness)
        except BaseException:
            await session.close()
            raise
        return session


class HarnessSession:
    """One episode: the calls of one harness, in their order."""

    def __init__(self, task: Task, endpoint: Loopback, channel: Channel) -> None:
        question = task.payload.get("question", "")
        self.question = question if isinstance(question, str) else ""
        self._system_prompt = ""
        self._tools: tuple[Tool, ...] = ()
        self._called = 0  # tool calls so far
        self._task, self._endpoint, self._channel = task, endpoint, channel
        self._running: Running | None = None
        self._ended: Ended | None = None
        self._turns: list[Observation] = []  # of the present call, the next one last
        self._reply: Reply | None = None  # to be sent; later the last one that was

    @property
    def system_prompt(self) -> str:
        """That of the harness's first call."""
        return self._system_prompt

    @property
    def tools(self) -> Sequence[Tool]:
        """Those of the harness's first call, and so of all."""
        return self._tools

    async def begin(self, harness: Harness) -> None:
        visit = Visit(self._endpoint.base_url, self._channel.key, self._task, bool(_gold(self._task)))
        self._running = harness.start(visit, self._on_end)
        call = await self._next_call()
        if call is None:
            where = "OPENAI_BASE_URL (a function's base_url) with the key in OPENAI_API_KEY (its api_key)"
            raise TaskError(f"task {self._task.id}: the harness ended without one call: it must call {where}")
        self._system_prompt = call.system_prompt or ""
        self._tools = tuple(
            Tool(tool["name"], tool["description"] or "", tool["parameters"] or {}) for tool in call.tools
        )
        self._take(call)

    async def observe(self) -> Observation | None:
        if not self._turns:
            call = await self._next_call()
            if call is None:
                return None
            self._take(call)
        return self._turns.pop()

    async def act(self, text: str) -> None:
        assert self._reply is not None and self._reply.text == text, "heard comes first"
        await self._endpoint.on_loop(self._channel.answer(self._reply, self._calls_in(text)))

    def _calls_in(self, text: str) -> tuple[SaidCall, ...]:
        """The tool calls of a reply. Where one cannot be read, none: the harness gets the text as it is."""
        found = readable_calls(text, [tool.name for tool in self._tools]) if self._tools else ()
        start, self._called = self._called, self._called + len(found)
        return tuple(SaidCall.of(f"call_{number}", call) for number, call in enumerate(found, start))

    async def outcome(self) -> Outcome:
        """Wait for the harness's end, which comes soon: where it is not over yet, its turns are used up."""
        ended = self._ended or await self._cut()
        return _outcome(self._task, ended.result, self._reply.text if self._reply else "")

    async def _cut(self) -> Ended:
        """Refuse further calls and wait for the end. Few harnesses catch a refusal: that is no failure."""
        await self._endpoint.on_loop(self._channel.end("all rollout.max_turns replies are given"))
        await self._next()
        assert self._ended is not None
        return self._ended if self._ended.error is None else Ended(None, None)

    async def close(self) -> None:
        await self._endpoint.close(self._channel)
        if self._running is not None:
            await asyncio.to_thread(self._running.stop)

    def _on_end(self, ended: Ended) -> None:
        """From the harness's own thread."""
        self._ended = ended
        self._endpoint.post(self._channel.finish())

    async def _next_call(self) -> Call | None:
        """The next call, None at the harness's end. Raises what ended it."""
        call = await self._next()
        if call is None and self._ended is not None and self._ended.error is not None:
            raise self._ended.error
        return call

    async def _next(self) -> Call | None:
        return await self._endpoint.on_loop(self._channel.next_call())

    def _take(self, call: Call) -> None:
        turns = [
            Observation(turn.text, wants_action=False, role=cast(TurnRole, turn.role)) for turn in call.turns
        ]
        most, stop, heard = call.max_tokens, call.stop, self._hear
        turns[-1] = replace(turns[-1], wants_action=True, max_tokens=most, stop=stop, heard=heard)
        self._turns = turns[::-1]

    def _hear(self, reply: Reply) -> None:
        self._reply = reply


# --- tasks ---------------------------------------------------------------------------------------------


def _tasks(config: HarnessConfig) -> dict[Split, list[Mapping[str, Any]]]:
    """The payloads of each split. Raises TaskError, ExtensionError."""
    setting = "environment.harness.tasks"
    if is_path(config.tasks) and not is_hub(config.tasks):
        function = load_extension(setting, config.tasks)
        with owned(f"{setting}={config.tasks}", TaskError, function):
            given = {split: _payloads(function(split)) for split in ("train", "eval")}
    else:
        what = "a .jsonl file, or hub:org/name, with an object for each task"
        file = DataFile(config.tasks, setting, what)
        rows = {str(number): row for number, row in file.lines(dict[str, Any])}
        out = held_out(list(rows), config.eval_fraction)
        given = {
            "train": [row for number, row in rows.items() if number not in out],
            "eval": [row for number, row in rows.items() if number in out],
        }
    for split, payloads in given.items():
        if not payloads:
            cure = "two tasks or more are needed, of which environment.harness.eval_fraction are held out"
            raise TaskError(f"{setting}={config.tasks} gives no task for the split {split}: {cure}")
    return {"train": given["train"], "eval": given["eval"]}


def _payloads(given: Any) -> list[Mapping[str, Any]]:
    payloads = list(given)
    for place, payload in enumerate(payloads):
        if not isinstance(payload, Mapping):
            raise TypeError(f"task {place} is {type(payload).__name__}, it must be a dict")
    return payloads


# --- the score -----------------------------------------------------------------------------------------


def _outcome(task: Task, result: Any, last_reply: str) -> Outcome:
    """``result``: a reward, an answer, {"reward", "answer", "parts"}, or None. Raises TaskError."""
    if isinstance(result, Outcome):
        return result
    fields: Mapping[str, Any] = result if isinstance(result, Mapping) else {}
    if isinstance(result, str):
        fields = {"answer": result}
    elif hasattr(result, "__float__"):  # Python's number, NumPy's or torch's
        fields = {"reward": result}
    elif result is not None and not fields:
        raise _unusable(task, f"gave {type(result).__name__}")
    if unknown := set(fields) - {"reward", "answer", "parts"}:
        raise _unusable(task, f"gave {', '.join(sorted(map(str, unknown)))}")
    parts = dict(fields.get("parts") or {})
    gold = _gold(task)
    if not gold:
        if fields.get("reward") is None:
            raise _unusable(task, "gave no reward, and the task has no answer")
        return Outcome(fields["reward"], parts, ())
    prediction = str(fields.get("answer", last_reply)).strip()
    scores = {"f1": max(plain_f1(prediction, right) for right in gold)}
    scores["em"] = max(plain_em(prediction, right) for right in gold)
    question = task.payload.get("question", "")
    answer = Answer(str(question), gold, prediction, "harness", scores)
    reward = scores["f1"] if fields.get("reward") is None else fields["reward"]
    return Outcome(reward, {**scores, **parts}, (answer,))


def _gold(task: Task) -> tuple[str, ...]:
    given = next((task.payload[name] for name in _GOLD if name in task.payload), ())
    texts: Sequence[Any] = given if isinstance(given, (list, tuple)) else (given,)
    return tuple(str(text) for text in texts if text is not None and str(text).strip())


def _unusable(task: Task, what: str) -> TaskError:
    wanted = 'a number (the reward), a text (the answer), or {"reward": ..., "answer": ..., "parts": {...}}'
    return TaskError(f"task {task.id}: the harness {what}: its result must be {wanted}")
