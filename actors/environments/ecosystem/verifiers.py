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
A reward function that raises, or gives no number, fails the episode; verifiers would count it as 0. What a
text cannot say is refused at start: tools, and rewards that compare the siblings of a group.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from actors.environments.base import Observation, Reply, Split, held_out, passes, task_seed
from actors.environments.ecosystem.stepped import as_text, package
from actors.protocols import TaskError
from actors.text.thoughts import visible_reply
from actors.types import Outcome, Task
from configs.schema import VerifiersConfig
from configs.user_code import owned

_raised: ContextVar[list[BaseException]] = ContextVar("raised")  # by the reward functions of this outcome


class VerifiersEnvironment:
    """The `verifiers` task source."""

    name = "verifiers"

    def __init__(self, config: VerifiersConfig) -> None:
        """Raises TaskError where the environment cannot be loaded, or needs more than texts."""
        os.environ.setdefault("VF_LOG_LEVEL", "CRITICAL")  # what it logs as an error fails an episode here
        for module in ("verifiers.envs.multiturn_env", "verifiers.utils.env_utils"):
            package(self.name, module)  # `import verifiers` alone hides what is missing
        package(self.name, "datasets").disable_progress_bars()
        self.system_prompt = config.system_prompt
        self._whom = f"environment.verifiers.id={config.id}"
        with owned(self._whom, TaskError), _no_signal_handlers():
            self._env = _loaded(config)
            self._rows = self._splits(config.eval_fraction)
        self._refuse_more_than_texts()
        _note_what_rewards_raise(self._env.rubric)

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
                system_prompt="\n\n".join(as_text(self._whom, text, "one content") for text in system),
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

    def _refuse_more_than_texts(self) -> None:
        if self._env.tool_defs:
            raise TaskError(f"{self._whom}: it gives the agent tools, and this adapter speaks in texts alone")
        if self._env.requires_group_rollouts:
            raise TaskError(
                f"{self._whom}: its rubric scores the siblings of a group together, "
                "and an episode here is scored alone: give each its own reward, and set objective.advantage"
            )


class VerifiersSession:
    """One rollout of the environment, whose model is the agent of this episode."""

    def __init__(self, env: Any, row: dict[str, Any], whom: str) -> None:
        self.question = ""
        self._env, self._row, self._whom = env, row, whom
        self._client = _bridge(self)
        self._rollout: asyncio.Task[Any] | None = None
        self._asked = asyncio.Event()
        self._first: Observation | None = None
        self._new = ""  # what the environment says
        self._reply: asyncio.Future[str] | None = None
        self._cut = False  # the last reply, by the limit of its tokens
        self._assistants = 0  # assistant messages that the next prompt must have
        self._state: Any = None

    async def begin(self) -> None:
        """Run the rollout up to its first question to the model."""
        self._rollout = asyncio.create_task(self._env.rollout(self._row, self._client, "engram"))
        self._first = await self._next()
        self.question = self._first.text if self._first else ""

    async def observe(self) -> Observation | None:
        first, self._first = self._first, None
        return first or await self._next()

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
        if tools:
            raise TaskError(f"{self._whom}: it gives the agent tools, and this adapter speaks in texts alone")
        self._new = self._what_is_new(messages)
        self._reply = asyncio.get_running_loop().create_future()
        self._asked.set()
        return await self._reply, self._cut

    async def _next(self) -> Observation | None:
        """Wait until the environment asks the agent, or ends the rollout. Raises what it raised."""
        assert self._rollout is not None, "begin comes first"
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait({asked, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self._asked.is_set():
            return Observation(self._new, wants_action=True, heard=self._hear)
        self._state = self._rollout.result()
        error = self._state.get("error")  # verifiers keeps errors of its own classes
        if isinstance(error, BaseException):
            raise error.__cause__ or error
        return None

    def _hear(self, reply: Reply) -> None:
        self._cut = reply.finish_reason == "length"

    def _answered(self) -> asyncio.Future[str]:
        """The question that is answered now."""
        assert self._reply is not None, "observe comes first"
        reply, self._reply = self._reply, None
        self._asked.clear()
        return reply

    def _what_is_new(self, messages: Sequence[Any]) -> str:
        """The text of the messages behind the last assistant's; the system's is the task's system prompt."""
        said = [message for message in messages if message.role == "assistant"]
        if not self._assistants:  # the row's own prompt may have examples
            self._assistants = len(said)
            new = [message for message in messages if message.role != "system"]
        elif len(said) != self._assistants:
            raise TaskError(
                f"{self._whom}: it shows the agent {len(said)} of its {self._assistants} replies: an "
                "environment that rewrites the conversation cannot be played, the memory is the agent's"
            )
        else:
            last = max(place for place, message in enumerate(messages) if message.role == "assistant")
            new = list(messages[last + 1 :])
        return "\n\n".join(self._text(message) for message in new)

    def _text(self, message: Any) -> str:
        content = as_text(self._whom, message.content, "pictures and sound cannot be read")
        return content if message.role == "user" else f"{message.role}: {content}"


def _bridge(session: VerifiersSession) -> Any:
    """A client of verifiers that asks the session's agent."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage

    class Bridge(Client):  # made here: the package is optional
        async def get_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
        ) -> Any:
            reply, cut = await session.ask(prompt, tools)
            reason = "length" if cut else "stop"
            message = ResponseMessage(content=reply, finish_reason=reason, is_truncated=cut)
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
