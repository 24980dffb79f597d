"""A user's session as an episode sees it: each call has an owner, a deadline and a check of what it gave.

    play, score --> HostedSession: observe, act, outcome, close --> the user's Session, sync or async

Whatever the user's code raises becomes a TaskError with their file and line: one failed episode. A late call
becomes one too, and says whom it waited for. Text that cannot be encoded is cleaned and counted.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from actors.environments.base import Environment, Observation, Reply, Session, part_of
from actors.environments.build import answers_at_once
from actors.environments.mixture import playing
from actors.environments.user_calls import CallThread, Raised, close_late, run_apart
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat, ChatTemplateError
from actors.text.plain_text import encodable, encodable_value
from actors.text.tools import Tool
from actors.types import Answer, Outcome, Task
from configs.user_code import fault, owned, place

T = TypeVar("T")

CLOSING_S = 30.0
"""The longest wait for a session's ``close``: with a score it stays within the driver's grace."""


class HostedSession:
    """One session of one episode. Single-use: ``start``, then the calls of a session, then ``close``.

    Inside ``async with`` it is closed at the end. A fault of its ``close`` hides no other: the first is the
    one to know.
    """

    def __init__(self, environment: Environment, task: Task, limit_s: float) -> None:
        self.cleaned = 0  # texts of the environment that could not be encoded
        self.system_prompt = self.question = ""
        self.own_prompt = ""  # the task's or the session's own system prompt, if it has one
        self.waits_for = ""  # the call of the user's code that runs now, or that was given up
        self.task = task
        self._environment, self._limit_s = environment, limit_s
        self._at_once = False  # whether its calls need no thread
        self._thread = CallThread(f"session of {task.id}")
        self._session: Session | None = None
        self._tools: tuple[Tool, ...] = ()

    async def __aenter__(self) -> HostedSession:
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            await self.close()
        except TaskError:
            if error is None:
                raise

    async def start(self) -> None:
        """Start the session. Raises TaskError."""
        task = self.task
        if task.fault:
            raise TaskError(task.fault)
        environment = playing(self._environment, task)
        self._at_once = answers_at_once(environment)
        session = await self._ask("start", environment.start, task)
        self._session = session
        with owned(self._whom("start"), TaskError, environment.start):  # a __getattr__ of theirs may raise
            for member in ("question", "observe", "act", "outcome"):
                if not hasattr(type(session), member) and not hasattr(session, member):
                    gave = f"{type(session).__name__} without {member}"
                    self._refuse("start", gave, "a Session", environment.start)
        question = await self._ask("question", lambda: session.question)
        own, prompt = await self._ask("system_prompt", lambda: _prompts_of(session, environment))
        self.question = self._text("question", question)
        self.own_prompt = self._text("system_prompt", task.system_prompt or own or "")
        self.system_prompt = self.own_prompt or self._text("system_prompt", prompt)
        if task.member:  # the mixture's prompt is another one
            self.own_prompt = self.system_prompt
        tools = await self._ask("tools", lambda: part_of(session, "tools", ()))
        with owned(self._whom("tools"), TaskError, _giver(session, "tools")):  # a sequence of their own
            self._tools = self._checked_tools(tools)

    def told_tools(self, chat: ChatFormat) -> ChatFormat:
        """``chat`` with the session's tools in its prompt, if it has some. Raises TaskError."""
        whom = self._whom("tools", _giver(self._session, "tools"))
        with owned(whom, TaskError):  # a template is the model's, and may stumble over a schema
            try:
                return chat.with_tools(self._tools)
            except ChatTemplateError as error:
                raise TaskError(f"{whom}: {error}") from error

    async def observe(self) -> Observation | None:
        """The next observation, None when the episode is over. Raises TaskError."""
        observe = self._open.observe
        observation = await self._ask("observe", observe)
        if observation is None:
            return None
        if not isinstance(observation, Observation):
            self._refuse("observe", type(observation).__name__, "an Observation or None", observe)
        text = self._text("observe", observation.text)
        return observation if text is observation.text else replace(observation, text=text)

    async def heard(self, call: Callable[[Reply], object], reply: Reply) -> None:
        """Tell the session how the reply was sampled, by the call of its observation. Raises TaskError."""
        await self._ask("heard", call, reply)

    async def act(self, text: str) -> None:
        """Give the agent's reply to the session. Raises TaskError."""
        await self._ask("act", self._open.act, text)

    async def outcome(self) -> Outcome:
        """The score, checked, in plain floats and texts. The caller has a deadline. Raises TaskError.

        Always apart from the episodes' loop: a shipped session may wait for a judge.
        """
        function = self._open.outcome
        outcome = await self._run("outcome", function, at_once=False)
        if not isinstance(outcome, Outcome):
            self._refuse("outcome", type(outcome).__name__, "an Outcome", function)
        with owned(self._whom("outcome"), TaskError, function):
            return self._checked(outcome)

    async def close(self) -> None:
        """Call the session's ``close``, if it has one. Raises TaskError; the session is gone all the same."""
        session, self._session = self._session, None
        if session is None and self._thread.busy:  # the start was given up
            self._thread.hand_on(close_late)
        # a call that was given up may hold the session's own thread for ever
        thread = CallThread(f"closing {self.task.id}") if self._thread.busy else self._thread
        try:
            with owned(self._whom("close"), TaskError):
                function = getattr(session, "close", None)
            if callable(function):
                await self._in_time("close", function, CLOSING_S, self._run("close", function, thread=thread))
        finally:
            thread.end()
            self._thread.end()

    @property
    def _open(self) -> Session:
        assert self._session is not None, "start comes first, and nothing after close"
        return self._session

    async def _ask(self, verb: str, function: Callable[..., Any], *arguments: object) -> Any:
        call = self._run(verb, function, *arguments)
        return await self._in_time(verb, function, self._limit_s, call)

    async def _in_time(
        self, verb: str, function: Callable[..., Any], limit_s: float, call: Coroutine[Any, Any, T]
    ) -> T:
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                return await call
        except TimeoutError:  # what the user's code raises is a TaskError by now
            limit = "" if verb == "close" else "rollout.environment_timeout_s="
            late = f"{self._whom(verb, function)} did not answer within {limit}{limit_s:g} s"
            raise TaskError(f"{late}: raise it, or give the call a limit of its own") from None

    async def _run(
        self,
        verb: str,
        function: Callable[..., Any],
        *arguments: object,
        at_once: bool = True,
        thread: CallThread | None = None,
    ) -> Any:
        """Return what the user's function returns. Raises TaskError."""
        if self._at_once and at_once:
            with owned(self._whom(verb), TaskError, function):
                return function(*arguments)
        self.waits_for = self._whom(verb, function)
        result = await run_apart(function, arguments, thread or self._thread)
        self.waits_for = ""
        if isinstance(result, Raised):
            raise fault(self._whom(verb), result.error, TaskError, function) from result.error
        return result

    def _whom(self, verb: str, function: object = None) -> str:
        where = place(None, function)
        return f"task {self.task.id}: the environment {self.task.environment}'s {verb}" + (
            f" ({where})" if where else ""
        )

    def _refuse(self, verb: str, gave: str, wanted: str, function: object) -> NoReturn:
        raise TaskError(f"{self._whom(verb, function)} gave {gave}, it must be {wanted}")

    # --- what the user's code gave ------------------------------------------------------------------------

    def _text(self, verb: str, value: object, what: str = "its text") -> str:
        """``value`` as it can be encoded; anything but a text is refused. ``what``: its name in a message."""
        if not isinstance(value, str):
            self._refuse(verb, f"{type(value).__name__} as {what}", "a text", None)
        text = encodable(value)
        self.cleaned += text is not value
        return text

    def _checked_tools(self, tools: object) -> tuple[Tool, ...]:
        if tools is None:
            return ()
        if not isinstance(tools, Sequence):
            self._refuse_tools(type(tools).__name__, "a sequence of Tool")
        return tuple(self._tool(tool) for tool in tools)

    def _tool(self, tool: object) -> Tool:
        """``tool`` as a prompt can hold it."""
        if not isinstance(tool, Tool):
            self._refuse_tools(type(tool).__name__, "a Tool(name, description, parameters)")
        if not (isinstance(tool.name, str) and isinstance(tool.description, str)):
            self._refuse_tools("a name or a description that is none", "a text")
        try:
            parameters = json.loads(json.dumps(dict(tool.parameters)))
        except (TypeError, ValueError, RecursionError) as error:
            self._refuse_tools(f"parameters of {tool.name} that are no JSON ({error})", "a JSON schema")
        clean = encodable_value(parameters)
        self.cleaned += clean != parameters
        return Tool(self._text("tools", tool.name), self._text("tools", tool.description), clean)

    def _refuse_tools(self, gave: str, wanted: str) -> NoReturn:
        self._refuse("tools", gave, wanted, _giver(self._session, "tools"))

    def _checked(self, outcome: Outcome) -> Outcome:
        """``outcome`` with Python's own floats and texts, so that it can be stored as JSON.

        A user's environment may count in NumPy or torch.
        """
        reward = self._number("the reward", outcome.reward)
        parts = self._numbers("reward part", outcome.reward_parts)
        answers = self._listed("answers", outcome.answers, "a tuple of Answer")
        return Outcome(reward, parts, tuple(map(self._answer, answers)))

    def _answer(self, answer: object) -> Answer:
        if not isinstance(answer, Answer):
            self._refuse_outcome(f"an answer as {type(answer).__name__}", "an Answer")
        gold: object = answer.gold
        texts = (gold,) if isinstance(gold, str) else self._listed("gold", gold, "a tuple of texts")
        return Answer(
            self._text("outcome", answer.question, "an answer's question"),
            tuple(self._text("outcome", text, "a gold answer") for text in texts),
            self._text("outcome", answer.prediction, "a prediction"),
            self._text("outcome", answer.category, "an answer's category"),
            self._numbers("score", answer.scores),
        )

    def _listed(self, name: str, value: object, wanted: str) -> Sequence[object]:
        """``value`` as a tuple: users also give arrays, sets and generators."""
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            self._refuse_outcome(f"{name} as {type(value).__name__}", wanted)
        return tuple(value)

    def _refuse_outcome(self, gave: str, wanted: str) -> NoReturn:
        raise TaskError(f"{self._gave} {gave}, it must be {wanted}")

    @property
    def _gave(self) -> str:
        return f"task {self.task.id}: the environment {self.task.environment} gave"

    def _numbers(self, kind: str, values: Mapping[str, float]) -> dict[str, float]:
        if not isinstance(values, Mapping):
            self._refuse_outcome(f"the {kind}s as {type(values).__name__}", "a mapping of names to numbers")
        return {
            self._text("outcome", name, f"the name of a {kind}"): self._number(f"the {kind} {name}", value)
            for name, value in values.items()
        }

    def _number(self, name: str, value: float) -> float:
        """``value`` as Python's own float. Raises TaskError where it is none, or not finite.

        A failed episode, not a value of 0 or none: the siblings would be compared with it, and a mean over
        them would be lost.
        """
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
            # name the type: the repr of an array would be many lines
            raise TaskError(f"{self._gave} {name} as {type(value).__name__}, it must be one number") from None
        if not math.isfinite(number):
            raise TaskError(f"{self._gave} {name} {number}, it must be a finite number")
        return number


def _prompts_of(session: Any, environment: Environment) -> tuple[object, object]:
    return part_of(session, "system_prompt", ""), environment.system_prompt


def _giver(session: object, name: str) -> object:
    """The user's function that a part of a session comes from: a property, or else the constructor."""
    prop = inspect.getattr_static(session, name, None)
    return prop.fget if isinstance(prop, property) else getattr(type(session), "__init__", None)
