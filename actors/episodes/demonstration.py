"""What an ideal agent would write as flashcards: supervised segments for the warm start.

A demonstration runs the loop, trigger, prompts and chat pieces of a real episode (episode.play,
ParametricMemory). Only the actor differs: it extracts the environment's gold flashcards and answers nothing.
So the taught text has exactly the form that is sampled later.

A demonstrated exchange teaches an answer: the one to a question that nothing told, or that a text told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from actors.environments.base import Demonstrator, Environment, Exchange, Rephraser
from actors.environments.user_calls import run_blocking
from actors.episodes.episode import play
from actors.episodes.hosted_session import HostedSession
from actors.memory.base import Agent, user_turns
from actors.memory.parametric import ParametricMemory
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.text.context import Context
from actors.text.encodable import encodable
from actors.text.flashcards import render_flashcards
from actors.types import (
    FastWeights,
    Flashcard,
    Generation,
    PolicyVersion,
    Segment,
    SpanKind,
    Task,
    WriteExample,
    WriteRequest,
    WriteResult,
)
from configs.schema import MemoryConfig, WriteConfig
from configs.user_code import owned


class DemonstratingEnvironment(Environment, Demonstrator, Protocol):
    """An environment that knows the gold flashcards of its tasks."""


def demonstrate(
    task: Task,
    environment: DemonstratingEnvironment,
    chat: ChatFormat,
    memory: MemoryConfig,
    write: WriteConfig,
    window_tokens: int,
    limit_s: float = 300.0,
) -> list[Segment]:
    """Return one segment for each extraction of ``task``, under Delta = 0 and version 0. Raises TaskError.

    The mask covers the extraction's tokens only. Log-probs are zeros. ``window_tokens`` is the engine's,
    ``limit_s`` the longest wait for a call of the environment.
    """

    async def demonstrated() -> list[Segment]:
        session = HostedSession(environment, task, limit_s)
        try:
            await session.start()
            actor = _Demonstrator(task, environment, chat, memory)
            agent = Agent(actor, chat, session.system_prompt, session.question)
            remembering = ParametricMemory(memory, write, window_tokens)
            await play(agent, session, remembering, max_answer_tokens=1, max_turns=_ALL_TURNS)
            return list(agent.finish())  # an empty answer leaves no trace, so each segment has an extraction
        finally:
            await session.close()

    return run_blocking(demonstrated())


def demonstrate_exchange(
    exchange: Exchange, system_prompt: str, chat: ChatFormat, memory: MemoryConfig
) -> Segment:
    """Return a segment with the last answer as its only taught text, under Delta = 0 and version 0."""
    system = chat.system(system_prompt)
    context = Context(system, chat.opened_by(system))
    for text in exchange.texts:
        for turn in user_turns(text, chat, memory.max_context_tokens):
            context.observe(turn)
    *earlier, (question, answer) = exchange.turns
    for asked, replied in earlier:
        reply = chat.reply(replied)
        context.observe(chat.user(asked) + chat.assistant_open + reply + chat.assistant_close(reply))
    context.observe(chat.user(question) + chat.assistant_open)
    context.act(_taught(chat, answer), "act")
    return context.close(0, 0)


def gold_flashcards(
    demonstrator: Demonstrator, task: Task, text_in_context: str, memory: MemoryConfig
) -> tuple[Flashcard, ...]:
    """Return what an ideal agent writes of ``text_in_context``.

    With memory.wordings=2 a fact's second card comes right behind its first, where the environment has one.
    """
    whom, show = f"task {task.id}: the environment {task.environment}'s", demonstrator.demonstrate_flashcards
    with owned(f"{whom} demonstrate_flashcards", TaskError, show):
        shown = show(task, text_in_context, memory.question_blind)
        cards = tuple(Flashcard(encodable(card.question), encodable(card.answer)) for card in shown)
    if memory.wordings == 1 or not isinstance(demonstrator, Rephraser):
        return cards
    with owned(f"{whom} wordings", TaskError, demonstrator.wordings):
        return tuple(
            Flashcard(encodable(question), card.answer)
            for card in cards
            for question in demonstrator.wordings(card.question)
        )


_ALL_TURNS = 1_000_000


class _Demonstrator:
    """The Actor that knows the gold flashcards."""

    def __init__(
        self, task: Task, environment: DemonstratingEnvironment, chat: ChatFormat, memory: MemoryConfig
    ) -> None:
        self.version: PolicyVersion = 0
        self.weights = FastWeights(basis_id="demonstration", revision=0, b={})
        self._task = task
        self._environment = environment
        self._chat = chat
        self._memory = memory

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        if kind == "act":
            return Generation((), (), "length")  # no answer is taught: an empty generation leaves no mask
        text = self._chat.decode(prompt_ids)
        cards = gold_flashcards(self._environment, self._task, text, self._memory)
        return _taught(self._chat, render_flashcards(cards))

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        """Accept without writing, so that the next extraction prompt shows these cards as saved."""
        request = WriteRequest(self._task.id, self.weights, tuple(examples))
        return request, WriteResult(self.weights, None, 0.0, 0.0, 0, 0.0, "accepted", "")


def _taught(chat: ChatFormat, text: str) -> Generation:
    ids = chat.reply(text)
    return Generation(ids, (0.0,) * len(ids), "stop")
