"""Parametric memory: flashcards of a full context are written into the fast weights, the context is cleared.

Method: TMEM, arXiv 2606.04536. The rows "TMEM" and "question-blind" (the prompt leaves the question out), and
the row "hybrid" (TMEM's write and MemAgent's summary at once).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from actors.memory.base import Agent, ContextMemory, turns_of
from actors.memory.controls import OWN_CARDS, WriteControl
from actors.memory.standing import StandingCards, standing_cards
from actors.memory.summary import Summary, rewrite_prompt
from actors.text.chat_template import ChatFormat, Ids
from actors.text.flashcards import (
    example_tokens,
    extraction_prompt,
    is_told,
    parse_flashcards,
    write_example,
    write_examples,
)
from actors.text.split_text import split_text
from actors.types import Flashcard
from configs.bounds import require
from configs.schema import MemoryConfig, RunConfig, WriteConfig

_LEAST_PIECE = 16  # tokens of a turn in a window that is too small
_CARD = Flashcard("q", "a")  # so that the prompt has its line of saved cards


class Flashcards:
    """Turns a full context into a write: extraction, parsing, examples of new and rehearsed cards."""

    def __init__(self, config: MemoryConfig, write: WriteConfig, control: WriteControl = OWN_CARDS) -> None:
        self._config = config
        self._write = write
        self._control = control

    async def extract(self, agent: Agent) -> str:
        """Ask for flashcards at the end of the running context. Return the agent's text as it is."""
        agent.context.observe(agent.chat.user(self._prompt(agent)))
        return await self._control.extract(agent, self._config.max_extract_tokens)

    def reserve(self, agent: Agent, full: bool) -> int:
        """Return the tokens that an extraction adds to the running context; ``full``: at most, ever."""
        saved = self._config.max_extract_tokens if full else 0
        turn = agent.chat.user(self._prompt(agent, full)) + agent.chat.assistant_open
        return len(turn) + saved + self._config.max_extract_tokens

    async def write(self, agent: Agent, text: str, told: Ids) -> None:
        """Write the flashcards in ``text``, the extraction of a context in which ``told`` was told.

        Adds exactly one record to the agent's write log.
        """
        limit = self._write.max_example_tokens
        parsed = parse_flashcards(text, self._write.max_flashcards)
        grounded = self._grounded(parsed.cards, agent.chat.decode(told))
        cards = tuple(card for card in self._control.written(grounded) if self._fits(agent, card))
        rejected = parsed.rejected + len(parsed.cards) - len(cards)
        if not cards:
            unusable = f"all {len(parsed.cards)} flashcards answer what nobody told (memory.grounded)"
            if grounded:
                unusable = f"all {len(grounded)} flashcards are over write.max_example_tokens={limit}"
            agent.skip_write(text, rejected, parsed.problem or unusable, parsed.repaired)
            return
        await self.teach(agent, cards, text, rejected, parsed.repaired)

    async def teach(
        self, agent: Agent, cards: Sequence[Flashcard], text: str = "", rejected: int = 0, repaired: int = 0
    ) -> None:
        """Write ``cards``, of which at least one fits, and log the write with the agent's own ``text``."""
        limit = self._write.max_example_tokens
        standing = StandingCards(agent.writes, self._config.wordings)
        standing.outdate(cards)
        earlier = standing.cards()
        rehearsed = earlier[max(0, len(earlier) - self._write.rehearsal) :]
        system_prompt, chat, depths = agent.system_prompt, agent.chat, self._write.depths
        examples = write_examples([*cards, *rehearsed], earlier, system_prompt, chat, depths, limit)
        await agent.write(text, cards, examples, rejected, repaired)

    def _prompt(self, agent: Agent, bare: bool = False) -> str:
        question = "" if self._config.question_blind else agent.question
        earlier = [_CARD] if bare else self._control.extracted(self._written(agent))
        shown = _newest(earlier, agent.chat, self._config.max_extract_tokens)
        return extraction_prompt(question, shown, self._config.wordings)

    def _grounded(self, cards: Sequence[Flashcard], told: str) -> list[Flashcard]:
        """Return the cards whose answer is among the words that were told, where that is asked for."""
        if not self._config.grounded:
            return list(cards)
        return [card for card in cards if is_told(card.answer, told)]

    def _fits(self, agent: Agent, card: Flashcard) -> bool:
        example = write_example(card, agent.system_prompt, agent.chat)
        return example_tokens(example) <= self._write.max_example_tokens

    def _written(self, agent: Agent) -> list[Flashcard]:
        return standing_cards(agent.writes, self._config.wordings)


class FlashcardMemory(ContextMemory):
    """A memory that extracts flashcards. It reads so that an extraction always fits the engine's window.

    A text longer than L_max is one turn, with one extraction, where it fits the window. Otherwise it comes in
    pieces, as for every memory.
    """

    def __init__(
        self,
        config: MemoryConfig,
        write: WriteConfig,
        window_tokens: int,
        control: WriteControl = OWN_CARDS,
    ) -> None:
        super().__init__(config.max_context_tokens)
        # with T the identity (write.epochs=0) no flashcards are asked for
        self._flashcards = None if write.epochs == 0 else Flashcards(config, write, control)
        self._window_tokens = window_tokens

    async def read(self, agent: Agent, text: str) -> None:
        if self._flashcards is None:
            await super().read(agent, text)
            return
        whole = agent.turn(text)
        if not self._has_room(agent, len(whole)) and len(whole) <= self._free(agent):
            await self.relieve(agent, len(whole))
        for turn in [whole] if self._has_room(agent, len(whole)) else self._pieces(agent, text):
            if not agent.context.is_fresh and not self._has_room(agent, len(turn)):
                await self.relieve(agent, len(turn))
            await self.take_in(agent, turn)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        """A turn without room for its answer and an extraction is read in pieces; the last is answered."""
        if self._overfills(agent, len(agent.turn(text)), max_tokens):
            limit = self._longest_piece(agent)
            *front, text = split_text(text, lambda piece: len(agent.turn(piece)), limit)
            for piece in front:
                await self.read(agent, piece)
        return await super().answer(agent, text, max_tokens)

    def _overfills(self, agent: Agent, turn: int, max_tokens: int) -> bool:
        """Return whether not even a fresh context can take in a ``turn`` to answer."""
        opened = turn + len(agent.chat.assistant_open)
        if self._opening(agent) + opened >= self._window_tokens:
            return True
        if self._flashcards is None or turn <= self.max_context_tokens:  # a turn within L_max is never split
            return False
        return opened + max_tokens + len(agent.chat.assistant_close(())) > self._free(agent)

    def _has_room(self, agent: Agent, incoming: int) -> bool:
        """Return whether an extraction still fits the window behind ``incoming`` more tokens."""
        tokens = len(agent.context) + incoming
        return tokens <= self.max_context_tokens or tokens + self.reserve(agent) <= self._window_tokens

    def _free(self, agent: Agent) -> int:
        """Return the tokens that a fresh context may take in before its extraction has no room."""
        return self._window_tokens - self._opening(agent) - self.reserve(agent)

    def _opening(self, agent: Agent) -> int:
        return len(agent.context) - len(agent.context.after_opening)

    def _pieces(self, agent: Agent, text: str) -> list[Ids]:
        return turns_of(text, agent.turn, self._longest_piece(agent))

    def _longest_piece(self, agent: Agent) -> int:
        opening = len(agent.chat.system(agent.system_prompt))
        # a relief between two pieces may save more: that must not take the next piece's room
        free = self._window_tokens - opening - self.reserve(agent, full=True)
        return max(_LEAST_PIECE, min(self.max_context_tokens, free))

    @abstractmethod
    def reserve(self, agent: Agent, full: bool = False) -> int:
        """Return the tokens that a relief adds to the running context at most.

        ``full``: with as much saved as there may be, also in front of the context.
        """


class ParametricMemory(FlashcardMemory):
    """The rows "TMEM" and "question-blind".

    Invariant: the relief of a context with news ends with one more write record and an empty context,
    whatever the model wrote. With T the identity nothing can move out of the context, so it is truncated:
    then the agent is the truncation agent, to the token.
    """

    async def teach(self, agent: Agent, cards: Sequence[Flashcard]) -> None:
        """Write ``cards`` that were written before, without a context; at least one of them must fit."""
        assert self._flashcards is not None, "write.epochs=0 writes nothing"
        await self._flashcards.teach(agent, cards)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        if self._flashcards is None:
            self.events["truncations"] += 1
            agent.truncate(self.max_context_tokens - incoming)
            return
        if self.cleared_without_news(agent):
            return
        told, text = agent.context.told, await self._flashcards.extract(agent)
        agent.clear()  # before the write: the segment was sampled under the revision that the write replaces
        await self._flashcards.write(agent, text, told)

    def reserve(self, agent: Agent, full: bool = False) -> int:
        return self._flashcards.reserve(agent, full) if self._flashcards is not None else 0


class HybridMemory(FlashcardMemory):
    """The row "hybrid": a full context becomes a new summary and a write, and is cleared.

    The summary is written first. So with T the identity the agent is the summary agent, to the token.
    """

    def __init__(
        self,
        config: MemoryConfig,
        write: WriteConfig,
        window_tokens: int,
        control: WriteControl = OWN_CARDS,
    ) -> None:
        super().__init__(config, write, window_tokens, control)
        self._summary = Summary(config)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        if self.cleared_without_news(agent, self._summary.remembered):
            return
        self.events[await self._summary.rewrite(agent)] += 1
        if self._flashcards is None:
            agent.clear(self._summary.remembered)
            return
        told, text = agent.context.told, await self._flashcards.extract(agent)
        agent.clear(self._summary.remembered)
        await self._flashcards.write(agent, text, told)

    def reserve(self, agent: Agent, full: bool = False) -> int:
        cards = self._flashcards.reserve(agent, full) if self._flashcards is not None else 0
        return self._summary.reserve(agent, full) + cards


def _newest(cards: Sequence[Flashcard], chat: ChatFormat, limit: int) -> list[Flashcard]:
    """Return the newest cards that take at most ``limit`` tokens in the prompt.

    Without this bound the cards of a long episode would fill the window.
    """
    kept: list[Flashcard] = []
    for card in reversed(cards):
        limit -= len(chat.encode(f"{card.question} {card.answer}")) + 1
        if limit < 0:
            break
        kept.append(card)
    return kept[::-1]


def require_window(config: RunConfig, chat: ChatFormat, questions: Sequence[str]) -> None:
    """Raise BoundError where the largest extraction does not fit ``engine.max_model_tokens``.

    ``questions``: those of the tasks, as far as they are known. Memories without flashcards always pass.

    A text that is read adds nothing: it comes in pieces that fit. A turn of more than
    memory.max_context_tokens that wants an answer may need more: then its episode fails, and says so.
    """
    memory, window = config.memory, config.engine.max_model_tokens
    if memory.policy not in ("parametric", "hybrid") or config.write.epochs == 0:
        return
    asked = () if memory.question_blind else questions
    question = max(asked, key=lambda text: len(chat.encode(text)), default="")
    reply = len(chat.assistant_open) + len(chat.assistant_close(()))
    answer = config.sampling.max_answer_tokens + reply
    prompt = len(chat.user(extraction_prompt(question, [_CARD], memory.wordings))) + reply
    summary = 0
    if memory.policy == "hybrid":
        summary = memory.max_summary_tokens
        prompt += len(chat.user(rewrite_prompt(question))) + reply
    least = memory.max_context_tokens + answer + prompt + 2 * memory.max_extract_tokens + summary
    parts = [
        f"memory.max_context_tokens={memory.max_context_tokens}",
        f"{answer} for an answer",
        f"{prompt} for the memory-writing prompt",
        f"saved and new flashcards of memory.max_extract_tokens={memory.max_extract_tokens} each",
        *([f"memory.max_summary_tokens={summary}"] if summary else []),
    ]
    cure = "raise it, or lower the others"
    require(window >= least, "engine.max_model_tokens", window, f"{least} or more: {', '.join(parts)}", cure)
