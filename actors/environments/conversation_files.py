"""Reads files of long conversations: LoCoMo (arXiv 2402.17753) and LongMemEval (arXiv 2410.10813).

Both give the same values: a conversation has sessions, each under its date, and questions about them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from actors.environments.data_file import (
    DataFile,
    MessageText,
    OptionalText,
    Place,
    Text,
    TextOrNumber,
    invalid,
    list_or_nothing,
    text_or_number,
)
from actors.environments.scoring import ADVERSARIAL, CATEGORY_NAMES

_SETTING = "environment.conversation.path"
_LOCOMO = "a LoCoMo file (a JSON list of conversations)"
_LONGMEMEVAL = "a LongMemEval file (a JSON list of questions with their chats)"
_SESSION_KEY = re.compile(r"session_(\d+)")
_EVIDENCE_SESSION = re.compile(r"D(\d+)")
_DATE = re.compile(r"\d{4}/\d\d/\d\d \(\w{3}\) \d\d:\d\d")  # 2023/05/30 (Tue) 23:40: sorts by time as a text


@dataclass(frozen=True, slots=True)
class DatedSession:
    """One session of a conversation: "Speaker: text" lines under a date, "" where the file has none.

    Sessions are numbered from 1.
    """

    number: int
    date: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a conversation. ``answer`` is "" where the conversation does not tell it.

    ``locomo_category`` picks the rule of LoCoMo's official scorer. It is None in LongMemEval, which that
    scorer does not judge. ``evidence_sessions`` may be empty. ``aliases`` are right too. ``rule`` scores
    MemoryAgentBench's answers, and is "" elsewhere.
    """

    text: str
    answer: str
    category: str  # as reported
    locomo_category: int | None
    evidence_sessions: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    rule: Literal["", "contains", "same"] = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """``sessions`` returns at least one session, in order. It may read the file again. Raises TaskError.

    ``system_prompt``: "" for the environment's.
    """

    id: str
    questions: tuple[Question, ...]
    sessions: Callable[[], Sequence[DatedSession]]
    system_prompt: str = ""


def read_locomo(path: str) -> list[Conversation]:
    """All conversations of a LoCoMo file. Raises TaskError."""
    file = DataFile(path, _SETTING, _LOCOMO, listed=True)
    items = file.items(_Locomo, "sample_id")
    return _with_unique_ids(file, "sample_id", (item.as_conversation(place.number) for place, item in items))


def read_longmemeval(path: str) -> list[Conversation]:
    """Each item of a LongMemEval file as a conversation with one question. Raises TaskError.

    The first pass checks each item and keeps only its question. An episode reads its own item again, half a
    megabyte in LongMemEval-S.
    """
    file = DataFile(path, _SETTING, _LONGMEMEVAL, listed=True)
    items = file.items(_LongMemEval, "question_id")
    return _with_unique_ids(file, "question_id", (item.as_conversation(file, place) for place, item in items))


def _with_unique_ids(file: DataFile, field: str, items: Iterable[Conversation]) -> list[Conversation]:
    conversations: dict[str, Conversation] = {}
    for number, conversation in enumerate(items):
        if conversation.id in conversations:
            raise file.fault(f"item {number}", f"{field} {conversation.id!r} occurs twice")
        conversations[conversation.id] = conversation
    return list(conversations.values())


# --- LoCoMo ---


@dataclass(frozen=True, slots=True)
class _LocomoTurn:
    speaker: TextOrNumber
    text: OptionalText
    blip_caption: OptionalText = ""

    @property
    def line(self) -> str:
        caption = f" [shares an image: {self.blip_caption}]" if self.blip_caption.strip() else ""
        return f"{self.speaker}: {self.text}{caption}"


@dataclass(frozen=True, slots=True)
class _LocomoSession:
    turns: list[_LocomoTurn]
    date_time: OptionalText = ""


def _by_session(conversation: object) -> object:
    """Group the file's flat fields by session, for pydantic.

    {"session_1": turns, "session_1_date_time": date} -> {"session_1": {"turns": turns, "date_time": date}}
    """
    if not isinstance(conversation, dict):
        return conversation  # pydantic refuses it
    numbers = sorted(int(match[1]) for key in conversation if (match := _SESSION_KEY.fullmatch(key)))
    if not numbers:
        raise invalid("Input should have session_1, session_2, ...")
    sessions: dict[str, dict[str, object]] = {f"session_{number}": {} for number in numbers}
    for name, session in sessions.items():
        for key, field in ((name, "turns"), (f"{name}_date_time", "date_time")):
            if key in conversation:
                session[field] = conversation[key]
    # some copies have null for a session that was not held
    return {name: session for name, session in sessions.items() if session["turns"] is not None}


def _category(value: object) -> object:
    """Let the text "4" stand for the number, for pydantic."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]\s*", value) else value


def _locomo_answer(value: object, info: ValidationInfo) -> str:
    """Every question needs an answer, except an adversarial one: its right answer is "not mentioned"."""
    return "" if info.data.get("category") == ADVERSARIAL else text_or_number(value)


@dataclass(frozen=True, slots=True)
class _LocomoQuestion:
    question: Text
    category: Annotated[
        int, BeforeValidator(_category), Field(ge=min(CATEGORY_NAMES), le=max(CATEGORY_NAMES))
    ]
    answer: Annotated[str, BeforeValidator(_locomo_answer), Field(validate_default=True)] = ""
    evidence: Annotated[tuple[Any, ...], BeforeValidator(list_or_nothing)] = ()  # D2:7: session 2, turn 7

    def as_question(self) -> Question:
        sessions = (number for entry in self.evidence for number in _EVIDENCE_SESSION.findall(str(entry)))
        name = CATEGORY_NAMES[self.category]
        return Question(self.question, self.answer, name, self.category, tuple(int(n) for n in sessions))


@dataclass(frozen=True, slots=True)
class _Locomo:
    conversation: Annotated[dict[str, _LocomoSession], BeforeValidator(_by_session)]
    qa: tuple[_LocomoQuestion, ...]
    sample_id: TextOrNumber = ""

    def as_conversation(self, number: int) -> Conversation:
        sessions = tuple(
            DatedSession(
                number=int(name.removeprefix("session_")),
                date=session.date_time,
                lines=tuple(turn.line for turn in session.turns),
            )
            for name, session in self.conversation.items()
        )
        questions = tuple(question.as_question() for question in self.qa)
        return Conversation(self.sample_id or f"conversation-{number}", questions, lambda: sessions)


# --- LongMemEval ---


@dataclass(frozen=True, slots=True)
class _ChatTurn:
    role: Literal["user", "assistant"]
    content: MessageText
    has_answer: Any = False


def _longmemeval_answer(value: object, info: ValidationInfo) -> str:
    """A question_id that ends in "_abs" marks a question that the chats do not answer.

    Its answer field only explains why, so it is left out.
    """
    return "" if info.data.get("question_id", "").endswith("_abs") else text_or_number(value)


@dataclass(frozen=True, slots=True)
class _LongMemEval:
    question_id: TextOrNumber
    question_type: Text
    question: Text
    haystack_sessions: tuple[tuple[_ChatTurn, ...], ...]
    question_date: OptionalText = ""
    haystack_dates: Annotated[tuple[OptionalText, ...], BeforeValidator(list_or_nothing)] = ()
    answer: Annotated[str, BeforeValidator(_longmemeval_answer), Field(validate_default=True)] = ""
    answer_session_ids: Annotated[tuple[TextOrNumber, ...], BeforeValidator(list_or_nothing)] = ()
    haystack_session_ids: Annotated[tuple[TextOrNumber, ...], BeforeValidator(list_or_nothing)] = ()

    def __post_init__(self) -> None:
        dates, sessions = len(self.haystack_dates), len(self.haystack_sessions)
        if dates not in (0, sessions):  # without any, the sessions stand in the file's order
            raise invalid(f"haystack_dates: {dates} dates stand beside {sessions} haystack_sessions")
        if not any(turn.content.strip() for session in self.haystack_sessions for turn in session):
            raise invalid("haystack_sessions: Input should have at least one turn with a text")

    def sessions(self) -> tuple[DatedSession, ...]:
        """All sessions in order of time; one in which nothing is said has no line."""
        return tuple(
            DatedSession(
                number=number,
                date=self.haystack_dates[place] if self.haystack_dates else "",
                lines=tuple(
                    f"{turn.role}: {text}"
                    for turn in self.haystack_sessions[place]
                    if (text := turn.content.strip())
                ),
            )
            for number, place in enumerate(self._by_time(), start=1)
        )

    def as_conversation(self, file: DataFile, place: Place) -> Conversation:
        question = Question(
            # "how many days ago" needs a day to count from
            text=f"[{self.question_date}] {self.question}" if self.question_date.strip() else self.question,
            answer=self.answer,
            category=self.question_type,
            locomo_category=None,
            evidence_sessions=self._evidence(),
        )
        return Conversation(self.question_id, (question,), _Haystack(file, place, self.question_id))

    def _evidence(self) -> tuple[int, ...]:
        """The numbers of the sessions that hold the answer: each is listed, or one of its turns is marked."""
        names = set(self.answer_session_ids)
        listed = {place for place, name in enumerate(self.haystack_session_ids) if name in names}
        return tuple(
            number
            for number, place in enumerate(self._by_time(), start=1)
            if place in listed or any(turn.has_answer is True for turn in self.haystack_sessions[place])
        )

    def _by_time(self) -> list[int]:
        """The places of the sessions in order of time; as they stand where a date has another form.

        LongMemEval-S is in that order, its oracle file is not.
        """
        dates = self.haystack_dates
        places = list(range(len(self.haystack_sessions)))
        if dates and all(_DATE.fullmatch(date) for date in dates):
            places.sort(key=lambda place: dates[place])
        return places


@dataclass(frozen=True, slots=True)
class _Haystack:
    """Reads the sessions of one item again. Raises TaskError when the file has changed."""

    file: DataFile
    place: Place
    question_id: str

    def __call__(self) -> Sequence[DatedSession]:
        item = self.file.read_item(self.place, _LongMemEval)
        if item is None or item.question_id != self.question_id:
            cause = "the file was changed after it was first read: start the run again"
            raise self.file.fault(f"item {self.place.number} ({self.question_id!r})", cause)
        return item.sessions()
