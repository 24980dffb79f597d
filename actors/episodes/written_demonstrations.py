"""Demonstrations that a user wrote by hand: a text, the flashcards to write of it, and answers.

A line of the file is one context. All but ``told`` and ``cards`` may be left out:

    {"told": ["Nora has moved to Lisbon.", "It rained."],
     "cards": [{"question": "Where does Nora live?", "answer": "Lisbon"}],
     "questions": [{"question": "Where is Nora now?", "answer": "Lisbon"}],
     "system_prompt": "Remember what you are told."}

``told`` is a text, a list of texts, or chat messages ({"role", "content"}). ``cards`` may be empty: nothing
is worth writing. They are taught as the extraction at the end of the context. Each of ``questions`` is asked
behind what was told and the questions before it, and its answer is taught. The extraction's request shows
them, unless the memory is question-blind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from actors.environments.data_file import DataFile, Text, TextOrNumber, invalid, message_text
from actors.environments.user_calls import run_blocking
from actors.episodes.demonstration import ShownActor, ShownCards, answered, assistant_turn
from actors.memory.base import Agent
from actors.memory.parametric import Flashcards
from actors.text.chat_template import ChatFormat
from actors.text.context import Context
from actors.text.flashcards import is_told, parse_flashcards, render_flashcards
from actors.types import Flashcard, Segment
from configs.schema import MemoryConfig, WriteConfig

SETTING = "warm_start.demonstrations"
_WHAT = 'a file of demonstrations, JSON lines such as {"told": text, "cards": [{"question", "answer"}]}'


@dataclass(frozen=True, slots=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Written:
    """One line of the file."""

    place: str  # "line 3", or "item 2" of a JSON list
    turns: tuple[Turn, ...]
    cards: tuple[Flashcard, ...]
    questions: tuple[tuple[str, str], ...]  # with their answers
    system_prompt: str  # empty: the environment's


class WrittenDemonstrations:
    """The lines of a file, and the segments that each of them teaches."""

    def __init__(self, path: str, memory: MemoryConfig, write: WriteConfig, system_prompt: str) -> None:
        """Reads and checks the file. Raises TaskError: it names file, line and field."""
        self._file = DataFile(path, SETTING, _WHAT)
        self._memory, self._write, self._system_prompt = memory, write, system_prompt
        self.lines = [_written(place, line) for place, line in self._file.named_lines(_Line)]
        if not self.lines:
            raise self._file.empty("demonstrations")
        for written in self.lines:
            if fault := self._fault(written):
                raise self._file.fault(written.place, fault)

    def segments(self, written: Written, chat: ChatFormat, window_tokens: int) -> list[Segment]:
        """The extraction, then an answer for each question. Raises TaskError where one has no room."""
        prompt = written.system_prompt or self._system_prompt
        segments = [self._extraction(written, prompt, chat)]
        for count in range(1, len(written.questions) + 1):
            system = chat.system(prompt)
            context = Context(system, chat.opened_by(system))
            _tell(context, written, chat)
            segments.append(answered(context, written.questions[:count], chat))
        longest = max(len(segment.token_ids) for segment in segments)
        if longest > window_tokens:
            problem = f"it has {longest} tokens with its request and cards, and the engine's window "
            cure = f"{window_tokens} (engine.max_model_tokens): split it into lines"
            raise self._file.fault(written.place, problem + cure)
        taught, most = int(segments[0].action_mask.sum()), self._memory.max_extract_tokens
        if taught > most:
            problem = f"its cards have {taught} tokens, more than memory.max_extract_tokens={most}"
            raise self._file.fault(written.place, f"{problem}: split it, or raise that")
        return segments

    def require_room(self, chat: ChatFormat, window_tokens: int) -> None:
        """Raise TaskError for the first line that has too many tokens."""
        for written in self.lines:
            self.segments(written, chat, window_tokens)

    def _extraction(self, written: Written, system_prompt: str, chat: ChatFormat) -> Segment:
        actor = ShownActor(chat, written.place)
        question = " ".join(question for question, _ in written.questions)
        agent = Agent(actor, chat, system_prompt, question)
        _tell(agent.context, written, chat)
        control = ShownCards(actor, lambda _: written.cards)
        run_blocking(Flashcards(self._memory, self._write, control).extract(agent))
        (segment,) = agent.finish()
        return segment

    def _fault(self, written: Written) -> str:
        """What is wrong with the cards of a line, "" for nothing."""
        cards, most = written.cards, self._write.max_flashcards
        if len(cards) > most:
            return f"cards: there are {len(cards)}, more than write.max_flashcards={most}"
        for number in range(len(cards)):
            if len(parse_flashcards(render_flashcards(cards[: number + 1]), most).cards) <= number:
                cause = "its question stands twice, or it is no flashcard (2000 characters a side at most)"
                return f"cards.{number}: {cause}"
            told = " ".join(turn.text for turn in written.turns)
            if self._memory.grounded and not is_told(cards[number].answer, told):
                cause = f"its answer {cards[number].answer[:80]!r} has a word that the text does not have"
                return f"cards.{number}: {cause} (memory.grounded)"
        return ""


def _tell(context: Context, written: Written, chat: ChatFormat) -> None:
    for turn in written.turns:
        if turn.role == "user":
            context.tell(chat.user(turn.text))
        else:
            context.observe(assistant_turn(chat, turn.text))


# --- a line of the file ---


def _turns(value: object) -> Sequence[Turn]:
    """The turns of a text, of texts, or of chat messages, for pydantic."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise invalid("Input should have at least one text")
    return [_turn(entry) for entry in entries]


def _turn(entry: object) -> Turn:
    role: object = "user"
    if isinstance(entry, dict):
        role, entry = entry.get("role"), message_text(entry.get("content"))
    if not isinstance(entry, str) or not entry.strip():
        raise invalid("Input should be a text, a list of texts, or chat messages, none of them blank")
    if role == "user":
        return Turn("user", entry)
    if role == "assistant":
        return Turn("assistant", entry)
    raise invalid(f"A message's role is {str(role)[:80]!r}, it must be user or assistant")


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question: Text = Field(validation_alias=AliasChoices("question", "instruction"))
    answer: TextOrNumber = Field(validation_alias=AliasChoices("answer", "output"))


class _Line(BaseModel):
    # A name that is misspelt would go unseen: "question" for "questions".
    model_config = ConfigDict(extra="forbid")

    told: Annotated[list[Turn], BeforeValidator(_turns)] = Field(
        validation_alias=AliasChoices("told", "texts", "text", "messages")
    )
    cards: list[_Card]
    questions: list[_Card] = []
    system_prompt: str = ""
    id: TextOrNumber = ""


def _written(place: str, line: _Line) -> Written:
    return Written(
        place,
        tuple(line.told),
        tuple(Flashcard(_one_line(card.question), _one_line(card.answer)) for card in line.cards),
        tuple((item.question, item.answer) for item in line.questions),
        line.system_prompt,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
