"""verifiers environments that reply turn by turn: MultiTurnEnv and what derives from it (verifiers 0.3).

    environment:
      name: verifiers
      verifiers: {id: my-environment, args: {difficulty: hard}}

    the environment's own rollout, a task of the event loop          the episode
        client.get_response(messages)   -- what is new in them -->   observe
        waits for the reply             <-- act --                   the agent
        env_response, stop conditions, cleanup
    rubric.score_rollout                                             outcome

Rows of its dataset are tasks, the rubric's sum is the reward, and the functions of the rubric are its parts.
A reward function that raises, or gives no number, fails the episode; verifiers would count it as 0. What this
adapter cannot play is refused at start: rewards that compare the siblings of a group.

Its tools are told in the model's own chat template. Calls in a reply become its ``tool_calls``, and what the
tools gave is read as turns of the tool (actors/text/tools.py).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from actors.environments.base import Observation, Reply, Split, held_out, passes, task_seed
from actors.environments.ecosystem.stepped import as_text, package
from actors.environments.user_calls import CallThread, Raised, is_async, run_apart
from actors.protocols import TaskError
from actors.text.thoughts import visible_reply
from actors.text.tools import Tool, before_calls, readable_calls, written_calls
from actors.types import Outcome, Task
from configs.schema import VerifiersConfig
from configs.user_code import owned

_raised: ContextVar[list[BaseException]] = ContextVar("raised")  # by the reward functions of this outcome


class VerifiersEnvironment:
    """The `verifiers` task source."""

    name = "verifiers"

    def __init__(self, config: VerifiersConfig) -> None:
        """Raises TaskError where the environment cannot be loaded, or scores siblings together."""
        os.environ.setdefault("VF_LOG_LEVEL", "CRITICAL")  # what it logs as an error fails an episode here
        for module in ("verifiers.envs.multiturn_env", "verifiers.utils.env_utils"):
            package(self.name, module)  # `import verifiers` alone hides what is missing
        package(self.name, "datasets").disable_progress_bars()
        self.system_prompt = config.system_prompt
        self._whom = f"environment.verifiers.id={config.id}"
        with owned(self._whom, TaskError), _no_signal_handlers():
            self._env = _loaded(config)
            self._rows = self._splits(config.eval_fraction)
        self._refuse_groups()
        _note_what_rewards_raise(self._env.rubric)
        tools: dict[str, Callable[..., Any]] = getattr(self._env, "tool_map", {})
        tools.update({name: _apart(name, tool) for name, tool in tools.items() if not is_async(tool)})

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless for train, a new order every pass; one pass for eval."""
        rows = self._rows[split]
        for position, place in passes(self.name, len(rows), split, seed, start):
            row = dict(rows[place])
            prompt = row["prompt"] if isinstance(row["prompt"], list) else []
            system = [message["content"] for message in prompt if message["role"] == "system"]
            yield Task(
                f"{self.name}-{split}-{seed}-{position}",
                self.name,
                row,
                task_seed(split, seed, position),
                system_prompt="\n\n".join(_content(self._whom, text) for text in system),
            )

    async def start(self, task: Task) -> VerifiersSession:
        session = VerifiersSession(self._env, dict(task.payload), self._whom)
        try:
            await session.begin()
        except BaseException:
            with suppress(Exception):  # a cleanup of theirs: the first fault is the one to know
                await session.close()
            raise
        return session

    def _splits(self, eval_fraction: float) -> dict[Split, Any]:
        """The dataset of each split."""
        train: Any = self._env.get_dataset()
        own: Any = self._env.build_eval_dataset()
        if own is not None:
            return {"train": train, "eval": own}
        ids = [str(name) for name in train["example_id"]]
        if len(ids) < 2:
            raise TaskError(f"{self._whom}: of {len(ids)} row none can be held out: at least 2 are needed")
        out = held_out(ids, eval_fraction)
        kept = [place for place, name in enumerate(ids) if name not in out]
        held = [place for place, name in enumerate(ids) if name in out]
        return {"train": train.select(kept), "eval": train.select(held)}

    def _refuse_groups(self) -> None:
        if self._env.requires_group_rollouts:
            raise TaskError(
                f"{self._whom}: its rubric scores the siblings of a group together, "
                "and an episode here is scored alone: give each its own reward, and set objective.advantage"
            )


class VerifiersSession:
    """One rollout of the environment, whose model is the agent of this episode."""

    def __init__(self, env: Any, row: dict[str, Any], whom: str) -> None:
        self.question = ""
        self.tools: tuple[Tool, ...] = ()  # known with the first question
        self._env, self._row, self._whom = env, row, whom
        self._client = _bridge(self)
        self._rollout: asyncio.Task[Any] | None = None
        self._asked = asyncio.Event()
        self._turns = deque[Observation]()  # what the environment says; the last one asks the agent
        self._reply: asyncio.Future[str] | None = None
        self._cut = False  # the last reply, by the limit of its tokens
        self._assistants = 0  # assistant messages that the next prompt must have
        self._state: Any = None

    async def begin(self) -> None:
        """Run the rollout up to its first question to the model."""
        self._rollout = asyncio.create_task(self._played())
        await self._next()
        self.question = "\n\n".join(turn.text for turn in self._turns if turn.role == "user")

    async def observe(self) -> Observation | None:
        if not self._turns:
            await self._next()
        return self._turns.popleft() if self._turns else None

    async def act(self, text: str) -> None:
        self._assistants += 1
        self._answered().set_result(visible_reply(text))

    async def outcome(self) -> Outcome:
        """The rubric's score; of what was said so far where the turn limit has ended the episode."""
        if self._state is None:
            await self._next()  # the environment's answer to the last act: it may be the end
        if self._reply is not None:
            from verifiers.errors import OverlongPromptError

            # the way in which a rollout of verifiers is cut: it stops, cleans up, and can be scored
            self._answered().set_exception(OverlongPromptError("rollout.max_turns has ended the episode"))
            await self._next()
        raised: list[BaseException] = []
        _raised.set(raised)
        await self._env.rubric.score_rollout(self._state)
        if raised:
            raise raised[0]
        parts = {name: float(value) for name, value in (self._state["metrics"] or {}).items()}
        return Outcome(float(self._state["reward"]), parts, ())

    async def close(self) -> None:
        if self._rollout is not None and not self._rollout.done():
            self._rollout.cancel()  # its `finally` cleans up
            await asyncio.wait({self._rollout})
        if self._state is not None:
            await self._env.rubric.cleanup(self._state)

    async def ask(self, messages: Sequence[Any], tools: Sequence[Any] | None) -> tuple[str, bool]:
        """The agent's reply to ``messages``, and whether it was cut. Raises TaskError."""
        told = tuple(Tool(tool.name, tool.description, tool.parameters) for tool in tools or ())
        if self._assistants and told != self.tools:
            raise TaskError(f"{self._whom}: it changes its tools in mid-episode, after the prompt told them")
        self.tools = told
        self._turns += self._as_turns(self._what_is_new(messages))
        self._reply = asyncio.get_running_loop().create_future()
        self._asked.set()
        return await self._reply, self._cut

    async def _next(self) -> None:
        """Wait until the environment asks the agent, or ends the rollout. Raises what it raised."""
        assert self._rollout is not None, "begin comes first"
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait({asked, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self._asked.is_set():
            return
        self._state = self._rollout.result()
        error = self._state.get("error")  # verifiers keeps errors of its own classes
        if isinstance(error, BaseException):
            raise error.__cause__ or error

    async def _played(self) -> Any:
        """The whole rollout. Raises TaskError: a SystemExit in a task would end the loop of all sessions."""
        with owned(self._whom, TaskError):
            return await self._env.rollout(self._row, self._client, "engram")

    def _hear(self, reply: Reply) -> None:
        self._cut = reply.finish_reason == "length"

    def _answered(self) -> asyncio.Future[str]:
        """The question that is answered now."""
        assert self._reply is not None, "observe comes first"
        reply, self._reply = self._reply, None
        self._asked.clear()
        return reply

    def _what_is_new(self, messages: Sequence[Any]) -> list[Any]:
        """The messages behind the last assistant's; the system's is the task's system prompt."""
        said = [message for message in messages if message.role == "assistant"]
        if not self._assistants:  # the row's own prompt may have examples
            self._assistants = len(said)
            return [message for message in messages if message.role != "system"]
        if len(said) != self._assistants:
            raise TaskError(
                f"{self._whom}: it shows the agent {len(said)} of its {self._assistants} replies: an "
                "environment that rewrites the conversation cannot be played, the memory is the agent's"
            )
        last = max(place for place, message in enumerate(messages) if message.role == "assistant")
        return list(messages[last + 1 :])

    def _as_turns(self, messages: Sequence[Any]) -> list[Observation]:
        """A turn of the tool for each of its results, and one of the user for what stands between them."""
        turns: list[Observation] = []
        for is_result, group in itertools.groupby(messages, lambda message: message.role == "tool"):
            if is_result:
                results = [_content(self._whom, message.content).strip() or "(nothing)" for message in group]
                turns += [Observation(result, wants_action=False, role="tool") for result in results]
            else:
                told = "\n\n".join(self._text(message) for message in group)
                turns.append(Observation(told, wants_action=False))
        *told_before, last = turns or [Observation("", wants_action=False)]
        return [*told_before, replace(last, wants_action=True, heard=self._hear)]

    def _text(self, message: Any) -> str:
        said = [_content(self._whom, message.content)]
        said += written_calls(
            (call.name, call.arguments) for call in getattr(message, "tool_calls", None) or ()
        )
        text = "\n".join(filter(None, said))
        return text if message.role == "user" else f"{message.role}: {text}"


def _content(whom: str, content: Any) -> str:
    """The text of a message's content, which may be a list of parts. Raises TaskError."""
    if content is None:  # of a message that only calls tools
        return ""
    if isinstance(content, list) and all(_part_of(part, "type") == "text" for part in content):
        content = "".join(str(_part_of(part, "text")) for part in content)
    return as_text(whom, content, "pictures and sound cannot be read")


def _part_of(value: Any, name: str) -> Any:
    """A field of a mapping, or of what verifiers makes of one."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _bridge(session: VerifiersSession) -> Any:
    """A client of verifiers that asks the session's agent."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage, ToolCall

    ids = itertools.count()

    class Bridge(Client):  # made here: the package is optional
        async def get_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
        ) -> Any:
            reply, cut = await session.ask(prompt, tools)
            # a call that cannot be read is a text, as with the servers that verifiers itself asks
            found = readable_calls(reply, [tool.name for tool in session.tools]) if session.tools else ()
            calls = [
                ToolCall(id=f"call_{next(ids)}", name=call.name, arguments=json.dumps(dict(call.arguments)))
                for call in found
            ]
            reason = "tool_calls" if calls else "length" if cut else "stop"
            message = ResponseMessage(
                content=before_calls(reply) if calls else reply,
                tool_calls=calls or None,
                finish_reason=reason,
                is_truncated=cut,
            )
            return Response(id="", created=0, model=model, message=message)

    Bridge.__abstractmethods__ = frozenset()  # the rest turns messages into a provider's format
    return Bridge(None)


def _loaded(config: VerifiersConfig) -> Any:
    """verifiers.load_environment, raising what the environment's own code raised."""
    from verifiers.utils.env_utils import load_environment

    try:
        return load_environment(config.id, **config.args)
    except (RuntimeError, ValueError) as error:
        raise error.__cause__ or error from None


@contextmanager
def _no_signal_handlers() -> Iterator[None]:
    """Keep verifiers from setting SIGINT and SIGTERM while an environment is constructed.

    Why: it sets them for its own programs. In a worker that would replace Ray's and ours, and in a thread it
    raises. Checked on verifiers 0.3.1, whose Environment.__post_init__ calls ``signal.signal``.
    """
    from verifiers.envs import environment

    environment.signal = SimpleNamespace(**{**vars(signal), "signal": lambda *_: None})
    try:
        yield
    finally:
        environment.signal = signal


def _note_what_rewards_raise(rubric: Any) -> None:
    """Wrap the reward functions of a rubric, and of those in it: verifiers logs what they raise as 0."""
    for inner in getattr(rubric, "rubrics", ()):
        _note_what_rewards_raise(inner)
    rubric.funcs = [_noted(function) for function in rubric.funcs]


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def call(*arguments: Any, **named: Any) -> Any:
        try:
            result = function(*arguments, **named)
            return float(await result if inspect.isawaitable(result) else result)
        except Exception as error:
            _raised.get([]).append(error)
            raise

    return call


def _apart(name: str, tool: Callable[..., Any]) -> Callable[..., Any]:
    """``tool`` in a thread: verifiers calls it on the event loop, where it would stop all sessions."""

    @functools.wraps(tool)
    async def call(*arguments: Any, **named: Any) -> Any:
        thread = CallThread(f"tool {name}")
        try:
            result = await run_apart(functools.partial(tool, *arguments, **named), (), thread)
        finally:
            thread.end()
        if isinstance(result, Raised):
            raise result.error
        return result

    return call
