"""What an ideal agent would write as flashcards: supervised segments for the warm start.

    CardsOf: from a full context to the cards to write of it
        the environment's own (gold_cards, asked_by_lot)    a teacher's (teacher.py)
        of a file (written_demonstrations.py)

A demonstration runs the loop, trigger, prompts and chat pieces of a real episode (episode.play,
ParametricMemory). Only the actor differs: it extracts those cards and answers nothing. So the taught text has
exactly the form that is sampled later.

A demonstrated exchange teaches an answer: the one to a question that nothing told, or that a text told.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.environments.base import Demonstrator, Environment, Exchange, Questioner, Rephraser
from actors.environments.user_calls import run_blocking
from actors.episodes.episode import play
from actors.episodes.hosted_session import HostedSession
from actors.memory.base import Agent, turns_of
from actors.memory.controls import WriteControl
from actors.memory.parametric import ParametricMemory
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat, Ids
from actors.text.context import Context
from actors.text.flashcards import render_flashcards
from actors.text.plain_text import encodable
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

ALL_TURNS = 1_000_000


class DemonstratingEnvironment(Environment, Demonstrator, Protocol):
    """An environment that knows the gold flashcards of its tasks."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What stands in a context when flashcards are asked for: all of it, what was told, and the request."""

    context: str
    told: str
    request: str


CardsOf = Callable[[Extraction], Sequence[Flashcard] | None]
"""The cards to write of a context; None: nothing is taught here. May block. Raises TaskError."""


def demonstrate(
    task: Task,
    environment: Environment,
    cards_of: CardsOf,
    chat: ChatFormat,
    memory: MemoryConfig,
    write: WriteConfig,
    window_tokens: int,
    limit_s: float = 300.0,
    max_turns: int = ALL_TURNS,
) -> list[Segment]:
    """Return one segment for each extraction of ``task``, under Delta = 0 and version 0. Raises TaskError.

    The mask covers the extraction's tokens only. Log-probs are zeros. ``window_tokens`` is the engine's,
    ``limit_s`` the longest wait for a call of the environment.
    """

    async def demonstrated() -> list[Segment]:
        async with HostedSession(environment, task, limit_s) as session:
            await session.start()
            actor = ShownActor(chat, task.id)
            agent = Agent(actor, session.told_tools(chat), session.system_prompt, session.question)
            remembering = ParametricMemory(memory, write, window_tokens, ShownCards(actor, cards_of))
            await play(agent, session, remembering, max_answer_tokens=1, max_turns=max_turns)
            return list(agent.finish())  # an empty answer leaves no trace, so each segment has an extraction

    return run_blocking(demonstrated())


def demonstrate_exchange(
    exchange: Exchange, system_prompt: str, chat: ChatFormat, memory: MemoryConfig
) -> Segment:
    """Return a segment with the last answer as its only taught text, under Delta = 0 and version 0."""
    system = chat.system(system_prompt)
    context = Context(system, chat.opened_by(system))
    for text in exchange.texts:
        for turn in turns_of(text, chat.user, memory.max_context_tokens):
            context.observe(turn)
    return answered(context, exchange.turns, chat)


def answered(context: Context, turns: Sequence[tuple[str, str]], chat: ChatFormat) -> Segment:
    """Close ``context`` behind questions with their answers, the last of which is taught."""
    *earlier, (question, answer) = turns
    for asked, replied in earlier:
        context.observe(chat.user(asked) + assistant_turn(chat, replied))
    context.observe(chat.user(question) + chat.assistant_open)
    context.act(_taught(chat, answer), "act")
    return context.close(0, 0)


def assistant_turn(chat: ChatFormat, text: str) -> Ids:
    """A whole reply that was not sampled."""
    reply = chat.reply(text)
    return chat.assistant_open + reply + chat.assistant_close(reply)


def gold_cards(demonstrator: Demonstrator, task: Task, memory: MemoryConfig) -> CardsOf:
    """The environment's own cards."""
    return lambda extraction: gold_flashcards(demonstrator, task, extraction.context, memory)


def gold_flashcards(
    demonstrator: Demonstrator, task: Task, text_in_context: str, memory: MemoryConfig
) -> tuple[Flashcard, ...]:
    """Return what an ideal agent writes of ``text_in_context``.

    With memory.wordings=2 a fact's second card comes right behind its first, where the environment has one.
    """
    return _in_wordings(demonstrator, task, _shown(demonstrator, task, text_in_context, memory), memory)


def asked_by_lot(demonstrator: Demonstrator, task: Task, memory: MemoryConfig) -> CardsOf:
    """The gold answers, each behind its own question or one beside it, drawn by lot of the task.

    They teach the form of a card, and that it speaks of the person: not what to ask. An environment without
    questions beside a card gives its gold cards.
    """

    def cards_of(extraction: Extraction) -> tuple[Flashcard, ...]:
        cards = _shown(demonstrator, task, extraction.context, memory)
        if isinstance(demonstrator, Questioner):
            lot, known = random.Random(f"asked by lot/{task.id}"), [card.question for card in cards]
            with owned(_whose(task, "questions_beside"), TaskError, demonstrator.questions_beside):
                beside = [demonstrator.questions_beside(card, known) for card in cards]
                cards = tuple(
                    Flashcard(encodable(lot.choice((card.question, *others))), card.answer)
                    for card, others in zip(cards, beside, strict=True)
                )
        return _in_wordings(demonstrator, task, cards, memory)

    return cards_of


def _shown(
    demonstrator: Demonstrator, task: Task, text_in_context: str, memory: MemoryConfig
) -> tuple[Flashcard, ...]:
    show = demonstrator.demonstrate_flashcards
    with owned(_whose(task, "demonstrate_flashcards"), TaskError, show):
        shown = show(task, text_in_context, memory.question_blind)
        return tuple(Flashcard(encodable(card.question), encodable(card.answer)) for card in shown)


def _in_wordings(
    demonstrator: Demonstrator, task: Task, cards: tuple[Flashcard, ...], memory: MemoryConfig
) -> tuple[Flashcard, ...]:
    if memory.wordings == 1 or not isinstance(demonstrator, Rephraser):
        return cards
    with owned(_whose(task, "wordings"), TaskError, demonstrator.wordings):
        return tuple(
            Flashcard(encodable(question), card.answer)
            for card in cards
            for question in demonstrator.wordings(card.question)
        )


def _whose(task: Task, method: str) -> str:
    return f"task {task.id}: the environment {task.environment}'s {method}"


class ShownActor:
    """The Actor that is told what it extracts: ``cards``. It answers nothing."""

    def __init__(self, chat: ChatFormat, episode_id: str) -> None:
        self.version: PolicyVersion = 0
        self.weights = FastWeights(basis_id="demonstration", revision=0, b={})
        self.cards: Sequence[Flashcard] | None = None  # of the next extraction
        self._chat = chat
        self._episode_id = episode_id

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        if kind == "act" or self.cards is None:
            return Generation((), (), "length")  # nothing is taught: an empty generation leaves no mask
        return _taught(self._chat, render_flashcards(self.cards))

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        """Accept without writing, so that the next extraction prompt shows these cards as saved."""
        request = WriteRequest(self._episode_id, self.weights, tuple(examples))
        return request, WriteResult(self.weights, None, 0.0, 0.0, 0, 0.0, "accepted", "")


class ShownCards(WriteControl):
    """Looks at a full context, and tells the actor which cards it extracts from it."""

    def __init__(self, actor: ShownActor, cards_of: CardsOf) -> None:
        self._actor, self._cards_of = actor, cards_of

    async def extract(self, agent: Agent, max_tokens: int) -> str:
        chat, context = agent.chat, agent.context
        *_, request = chat.turns(context.ids)
        told = "\n\n".join(turn.text for turn in chat.turns(context.told))
        extraction = Extraction(chat.decode(context.ids), told, request.text)
        # apart: a teacher waits for its endpoint
        self._actor.cards = await asyncio.to_thread(self._cards_of, extraction)
        return await agent.reply("extract", max_tokens)


def _taught(chat: ChatFormat, text: str) -> Generation:
    ids = chat.reply(text)
    return Generation(ids, (0.0,) * len(ids), "stop")
