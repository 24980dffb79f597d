"""Tends a memory: lists its flashcards, corrects or forgets some, and says what a rebuilt Delta knows.

    the cards of the writes --Edits--> the cards that remain --written from Delta = 0--> a new Delta, Rebuilt

Why from Delta = 0: a card leaves traces in the weights of every later write. Nothing takes one card out.
"""

from __future__ import annotations

import asyncio
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from actors.memory.base import Actor, Agent
from actors.text.flashcards import MAX_SIDE_CHARACTERS, clean, example_tokens, write_example
from actors.types import AdapterKey, Flashcard, WriteRecord
from actors.write.writer import KNOWN
from cluster.assistant.opening import AssistantError, Parts
from cluster.common.printable import plural

if TYPE_CHECKING:
    from actors.memory.parametric import ParametricMemory
    from cluster.assistant.conversation import Conversation
    from cluster.assistant.memory_file import SavedMemory


@dataclass(frozen=True, slots=True)
class Edits:
    """What is to change, by the cards' numbers in the list, from 1 on."""

    forget: tuple[int, ...] = ()
    correct: Mapping[int, str] = field(default_factory=dict)  # number -> the right answer

    def __bool__(self) -> bool:
        return bool(self.forget or self.correct)

    def applied(self, cards: Sequence[Flashcard]) -> tuple[Flashcard, ...]:
        """The cards that remain, with their right answers. Raises AssistantError."""
        for number in (*self.forget, *self.correct):
            if not 1 <= number <= len(cards):
                listed = f"there are 1 to {len(cards)}" if cards else "there are none"
                raise AssistantError(f"there is no flashcard {number}: {listed}")
        if both := sorted({*self.forget} & {*self.correct}):
            raise AssistantError(f"flashcard {both[0]} is to be forgotten and corrected: choose one")
        forget, answers = {*self.forget}, {n: _answer(n, text) for n, text in self.correct.items()}
        return tuple(
            Flashcard(card.question, answers.get(number, card.answer))
            for number, card in enumerate(cards, start=1)
            if number not in forget
        )


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What became of a Delta that was written anew.

    losses: of each card in nats per answer token, by the engine under the new Delta; inf for a card that is
    too long to be asked. remaining: what still tells a changed or forgotten answer.
    """

    cards: tuple[Flashcard, ...]
    losses: tuple[float, ...]
    seconds: float
    remaining: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report, for people."""
        lines: list[str] = []
        unknown = [number for number, loss in enumerate(self.losses) if not loss <= KNOWN]
        count = len(self.cards)
        if count:
            known = f"{count - len(unknown)} of {plural(count, 'flashcard')} learnt"
            lines.append(f"{known} (a loss of at most {KNOWN:g} nats a token) in {self.seconds:.1f} s")
        else:
            lines.append("no flashcards remain: Delta is 0")
        if unknown:
            lines.append(f"{len(unknown)} did not take, by their loss:")
            lines += [f"  {self.losses[i]:6.2f}  {_told(self.cards[i])}" for i in unknown]
        return [*lines, *self.remaining]


async def written_anew(
    cards: Sequence[Flashcard], system_prompt: str, parts: Parts, memory: ParametricMemory, actor: Actor
) -> tuple[WriteRecord, ...]:
    """Write ``cards`` as the fresh ``actor``, as many at once as an extraction may have.

    Returns the write log. Raises AssistantError, EngineError, ReceiptError, WriterError.
    """
    write, agent = parts.opening.config.write, Agent(actor, parts.chat, system_prompt, "")
    for start in range(0, len(cards), write.max_flashcards):
        part = cards[start : start + write.max_flashcards]
        sizes = [example_tokens(write_example(card, system_prompt, parts.chat)) for card in part]
        if min(sizes) > write.max_example_tokens:
            limit = f"write.max_example_tokens={write.max_example_tokens}"
            raise AssistantError(f"the flashcards from {start + 1} on are all over {limit}: raise it")
        await memory.teach(agent, part)
        if (last := agent.writes[-1]).outcome != "accepted":
            raise AssistantError(f"the flashcards cannot be written anew: {last.reason}")
    return tuple(replace(record, examples=(), preserved=()) for record in agent.writes)


async def losses_of(
    cards: Sequence[Flashcard], system_prompt: str, parts: Parts, adapter: AdapterKey
) -> tuple[float, ...]:
    """Nats per answer token of each card, as the engine acts; inf for one that it cannot take."""

    async def loss(card: Flashcard) -> float:
        example = write_example(card, system_prompt, parts.chat)
        if example_tokens(example) >= parts.opening.config.engine.max_model_tokens:
            return math.inf
        logprobs = await parts.policy.score((*example.prompt_ids, *example.answer_ids), adapter)
        return -fmean(logprobs[-len(example.answer_ids) :])

    return tuple(await asyncio.gather(*map(loss, cards)))


def can_read(memory: SavedMemory, parts: Parts) -> bool:
    """Whether the context of another model's memory says the same in this model's tokens."""
    ids, size = memory.context_ids, parts.opening.model.vocab_size
    return all(0 <= token_id < size for token_id in ids) and parts.chat.decode(ids) == memory.context


def remaining(before: Sequence[Flashcard], after: Sequence[Flashcard], context: str) -> tuple[str, ...]:
    """Lines about what still tells an answer of ``before`` that is not in its card of ``after`` any more."""
    lines: list[str] = []
    stay, saying = {*after}, defaultdict[str, list[str]](list)
    for number, card in enumerate(after, start=1):
        saying[card.answer.casefold()].append(str(number))
    for answer in dict.fromkeys(card.answer for card in before if card not in stay):
        if same := saying.get(answer.casefold()):
            lines.append(f"note: {answer!r} is still the answer of flashcard {', '.join(same)}")
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", context, re.IGNORECASE):
            lines.append(
                f"note: {answer!r} also stands in what is not written yet, and may come back with the next "
                "write: look again after it"
            )
    return tuple(lines)


def card_lines(cards: Sequence[Flashcard], width: int) -> list[str]:
    """The numbered cards, in lines of at most ``width`` columns."""
    digits = len(str(len(cards)))
    lines: list[str] = []
    for number, card in enumerate(cards, start=1):
        lines += textwrap.wrap(
            _told(card),
            max(width, 40),
            initial_indent=f"{number:{digits}d}  ",
            subsequent_indent=" " * (digits + 4),
        )
    return lines


def parse_edits(forget: Sequence[int], correct: Sequence[str]) -> Edits:
    """The edits of ``--forget N`` and ``--correct N=ANSWER``. Raises AssistantError."""
    answers: dict[int, str] = {}
    for text in correct:
        number, equals, answer = text.partition("=")
        if not equals or not number.strip().isdecimal():
            raise AssistantError(f"--correct {text}: must be N=ANSWER, e.g. --correct '3=in Porto'")
        if int(number) in answers:
            raise AssistantError(
                f"--correct {text}: flashcard {int(number)} is corrected twice: choose one answer"
            )
        answers[int(number)] = answer
    return Edits(tuple(forget), answers)


def memory_body(conversation: Conversation) -> dict[str, object]:
    """A conversation's memory as JSON. For an HTTP route, as ``edit_memory`` is."""
    cards = [
        {"number": number, "question": card.question, "answer": card.answer}
        for number, card in enumerate(conversation.cards, start=1)
    ]
    unwritten = conversation.unwritten_tokens
    return {"revision": conversation.revision, "unwritten_tokens": unwritten, "flashcards": cards}


async def edit_memory(conversation: Conversation, data: object) -> dict[str, object]:
    """Do what ``data`` asks: {"forget": [5], "correct": {"3": "in Porto"}}. Returns the memory afterwards.

    Also each card's loss, how many were learnt, and the notes. The caller holds the conversation's lock.
    Raises as ``Conversation.tend`` does; then nothing changed.
    """
    rebuilt = await conversation.tend(_asked(data))
    # JSON has no inf: a card that is too long to be asked has null.
    losses = [loss if math.isfinite(loss) else None for loss in rebuilt.losses]
    known = sum(loss <= KNOWN for loss in rebuilt.losses)
    return memory_body(conversation) | {"losses": losses, "learnt": known, "notes": list(rebuilt.remaining)}


def _asked(data: object) -> Edits:
    fields = data if isinstance(data, dict) else {}
    forget, correct = fields.get("forget", []), fields.get("correct", {})
    is_list = isinstance(forget, list) and all(type(number) is int for number in forget)
    is_table = isinstance(correct, dict) and all(
        str(number).isdecimal() and isinstance(answer, str) for number, answer in correct.items()
    )
    if not fields or not is_list or not is_table or {*fields} - {"forget", "correct"}:
        raise AssistantError('the body must be like {"forget": [5], "correct": {"3": "in Porto"}}')
    answers = {int(number): answer for number, answer in correct.items()}
    if len(answers) < len(correct):  # "3" and "03"
        raise AssistantError("correct: a flashcard is corrected twice: choose one answer")
    return Edits(tuple(forget), answers)


def _answer(number: int, text: str) -> str:
    answer = clean(text)
    if not 0 < len(answer) <= MAX_SIDE_CHARACTERS:
        raise AssistantError(f"flashcard {number}: an answer has 1 to {MAX_SIDE_CHARACTERS} characters")
    return answer


def _told(card: Flashcard) -> str:
    return clean(f"{card.question} -> {card.answer}")
