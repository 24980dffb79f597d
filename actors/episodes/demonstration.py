"""What an ideal agent would write as flashcards: supervised segments for the warm start.

The demonstration is played by the very loop, trigger, prompt and chat pieces of a real episode (episode.play, ParametricMemory). Only the actor
differs: it extracts the environment's gold flashcards and answers nothing. So what is taught has exactly the form that is later sampled.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from actors.environments.base import Demonstrator, Environment
from actors.episodes.episode import play
from actors.memory.base import Agent
from actors.memory.parametric import ParametricMemory
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import (
    FastWeights,
    Generation,
    PolicyVersion,
    Segment,
    SpanKind,
    Task,
    WriteExample,
    WriteResult,
)
from configs.schema import MemoryConfig, WriteConfig

T = TypeVar("T")


class DemonstratingEnvironment(Environment, Demonstrator, Protocol):
    """A task source that knows the gold flashcards."""


def demonstrate(
    task: Task,
    environment: DemonstratingEnvironment,
    chat: ChatFormat,
    memory: MemoryConfig,
    write: WriteConfig,
) -> list[Segment]:
    """One segment for every extraction of ``task``, under Delta = 0, version 0. The mask covers the extraction's tokens only; log-probs are zeros.

    Raises TaskError.
    """
    session = environment.start(task)
    actor = _Demonstrator(task, environment, chat, memory.question_blind)
    agent = Agent(actor, chat, environment.system_prompt, session.question)
    _run_now(play(agent, session, ParametricMemory(memory, write), max_answer_tokens=1, max_turns=_ALL_TURNS))
    return [segment for segment in agent.finish() if any(span.kind == "extract" for span in segment.spans)]


_ALL_TURNS = 1_000_000


class _Demonstrator:
    """The Actor that knows the answers."""

    def __init__(
        self, task: Task, environment: DemonstratingEnvironment, chat: ChatFormat, question_blind: bool
    ) -> None:
        self.version: PolicyVersion = 0
        self.weights = FastWeights(basis_id="demonstration", revision=0, b={})
        self._task = task
        self._environment = environment
        self._chat = chat
        self._question_blind = question_blind

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        if kind == "act":
            return Generation((), (), "length")  # no answer is taught, and an empty generation leaves no mask
        cards = self._environment.demonstrate_flashcards(
            self._task, self._chat.decode(prompt_ids), self._question_blind
        )
        ids = self._chat.reply(render_flashcards(cards))
        return Generation(ids, (0.0,) * len(ids), "stop")

    async def learn(self, examples: Sequence[WriteExample]) -> WriteResult:
        """Nothing is written: the demonstration counts as accepted so that the next prompt shows it as already saved."""
        return WriteResult(
            self.weights,
            None,
            loss_before=0.0,
            loss_after=0.0,
            steps=0,
            seconds=0.0,
            outcome="accepted",
            reason="",
        )


def _run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, with or without an event loop around."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise AssertionError("a demonstration must not wait for anything")
