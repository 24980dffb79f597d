"""The terminal face of a conversation: reads lines, says what the agent says, and shows when it writes and what.

A line that begins with / is a command, any other is said to the agent. Lines come from the terminal or from a pipe (then they are shown, too, so that
the output reads as a transcript). A turn that is interrupted or fails is forgotten, and the conversation goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO, TypeVar

from actors.protocols import EngineError, ReceiptError, WriterError
from actors.types import WriteRecord
from cluster.assistant.conversation import Conversation
from cluster.assistant.opening import parts_of
from cluster.assistant.values import AssistantError, Opening, Reply
from cluster.common.display import Display

T = TypeVar("T")

_HELP = """/write             write what is in the context now, and clear it
/delta off|on      answer without, or with, what was written (the comparison)
/compare QUESTION  both answers side by side, from an empty context: what the weights alone know
/cards             all flashcards written so far
/tell TEXT         something that wants no answer
/read FILE         read a text file; it is written in pieces where it is longer than the context
/save DIR          the memory as a PEFT adapter (safetensors), with all that is needed to go on
/load DIR          go on from a saved memory
/new               forget everything
/status            context, revision, Delta
/help, /quit"""
_MAX_FILE_BYTES = 2**20


def chat(opening: Opening, memory: Path | None, source: TextIO, display: Display) -> int:
    """Talk until /quit or the end of ``source``; returns how many turns and commands failed. Raises EngineError when no engine starts."""
    display.say(f"loading {opening.title} ...")
    with parts_of(opening, slots=1) as parts, asyncio.Runner() as runner:
        conversation = Conversation(parts, "chat", opening.system_prompt)
        face = ChatFace(conversation, opening, runner, display)
        if memory is not None:
            face.load(str(memory))
        display.say(
            f"ready: a context of {opening.config.memory.max_context_tokens} tokens; /help lists the commands, /quit ends"
        )
        face.converse(source)
        return face.failures


class ChatFace:
    """``runner`` runs the conversation's coroutines between two lines; Ctrl-C cancels the one that is running."""

    def __init__(
        self, conversation: Conversation, opening: Opening, runner: asyncio.Runner, display: Display
    ) -> None:
        self.failures = 0
        self._talk, self._opening, self._runner, self._display = conversation, opening, runner, display
        self._limit = opening.config.memory.max_context_tokens
        self._commands: dict[str, Callable[[str], None]] = {
            "write": self._write,
            "delta": self._delta,
            "compare": self._compare,
            "cards": self._cards,
            "tell": self._tell,
            "read": self._read,
            "save": self._save,
            "load": self.load,
            "new": self._new,
            "status": self._status,
            "help": lambda rest: self._note(_HELP),
        }

    def converse(self, source: TextIO) -> None:
        for line in self._lines(source):
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text:
                self._attempt(text)

    def load(self, rest: str) -> None:
        self._wait(self._talk.load(self._folder(rest, "load")))
        self._note(
            f"loaded {rest}: {_plural(len(self._talk.cards), 'flashcard')}, revision {self._talk.revision}"
        )

    # --- turns ---------------------------------------------------------------------------------------------------------------------------------

    def _attempt(self, text: str) -> None:
        try:
            if text.startswith("/"):
                name, _, rest = text[1:].partition(" ")
                if name not in self._commands:
                    raise AssistantError(f"/{name} is no command; /help lists them")
                self._commands[name](rest.strip())
            else:
                self._say(text)
        except (AssistantError, EngineError, ReceiptError, WriterError) as error:
            self._fail(" ".join(str(error).split()))
        except TimeoutError:
            self._fail(
                f"no answer within assistant.request_timeout_s={self._opening.config.assistant.request_timeout_s:g}; the turn is forgotten"
            )
        except KeyboardInterrupt:
            self._note("interrupted: the turn is forgotten; /quit ends")

    def _say(self, text: str) -> None:
        if self._talk.will_write(text):
            self._note(
                f"the context is full ({self._talk.context_tokens} of {self._limit} tokens): writing flashcards ..."
            )
        reply = self._wait(self._talk.say(text, self._opening.config.sampling.max_answer_tokens))
        self._show_writes(reply.writes)
        self._display.say(f"agent> {_shown(reply)}")

    def _write(self, rest: str) -> None:
        record = self._wait(self._talk.write())
        if record is None:
            raise AssistantError("the context is empty: there is nothing to write")
        self._show_writes((record,))

    def _delta(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise AssistantError(f"/delta {rest}: must be on or off")
        self._talk.delta = rest == "on"
        self._status("")

    def _compare(self, rest: str) -> None:
        if not rest:
            raise AssistantError("/compare needs a question")
        was, most = self._talk.delta, self._opening.config.sampling.max_answer_tokens
        try:
            for on in (False, True):
                self._talk.delta = on
                answer = _shown(self._wait(self._talk.ask(rest, most)))
                self._note(f"{'with Delta   ' if on else 'without Delta'}: {answer}")
        finally:
            self._talk.delta = was

    def _cards(self, rest: str) -> None:
        if not (cards := self._talk.cards):
            self._note("nothing written yet")
        for card in cards:
            self._note(f"  {card.question} -> {card.answer}")

    def _tell(self, rest: str) -> None:
        if not rest:
            raise AssistantError("/tell needs a text")
        self._show_writes(self._wait(self._talk.read(rest)))

    def _read(self, rest: str) -> None:
        path = Path(rest).expanduser()
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise AssistantError(
                    f"{path}: has {path.stat().st_size} bytes, at most {_MAX_FILE_BYTES} are read"
                )
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AssistantError(f"/read {rest}: cannot be read as UTF-8 text ({error})") from error
        self._show_writes(self._wait(self._talk.read(text)))
        self._status("")

    def _save(self, rest: str) -> None:
        self._talk.save(self._folder(rest, "save"), overwrite=False)
        self._note(
            f"saved {rest}: revision {self._talk.revision}, {_plural(self._talk.unwritten_tokens, 'token')} of context not yet in the weights"
        )

    def _new(self, rest: str) -> None:
        self._wait(self._talk.reset())
        self._status("")

    def _status(self, rest: str) -> None:
        delta = "on" if self._talk.delta else "off (answers are the base model's)"
        cards = _plural(len(self._talk.cards), "flashcard")
        self._note(
            f"context {self._talk.context_tokens} of {self._limit} tokens; revision {self._talk.revision}, {cards}; Delta {delta}"
        )

    # --- how -----------------------------------------------------------------------------------------------------------------------------------

    def _wait(self, turn: Coroutine[Any, Any, T]) -> T:
        console = self._display.console
        with console.status("...") if console.is_terminal else nullcontext():
            return self._runner.run(asyncio.wait_for(turn, self._opening.config.assistant.request_timeout_s))

    def _lines(self, source: TextIO) -> Iterator[str]:
        if not source.isatty():
            for line in source:
                self._display.say(f"you> {line.rstrip()}")
                yield line
            return
        import readline  # noqa: F401  (arrow keys and history in input())

        while True:
            try:
                yield input("you> ")
            except EOFError:
                return

    def _show_writes(self, writes: tuple[WriteRecord, ...]) -> None:
        for record in writes:
            for line in describe_write(record):
                self._note(line)

    def _folder(self, rest: str, command: str) -> Path:
        if not rest:
            raise AssistantError(f"/{command} needs a folder")
        return Path(rest).expanduser()

    def _note(self, text: str) -> None:
        for line in text.split("\n"):
            self._display.say(f"  ~ {line}")

    def _fail(self, message: str) -> None:
        self.failures += 1
        self._display.say(f"error: {message}")


def describe_write(record: WriteRecord) -> list[str]:
    """What a write did, for a person: one line, and one for each flashcard."""
    if record.outcome == "empty":
        said = " ".join(record.extraction.split())
        return [
            f"nothing written: {record.reason}; asked for flashcards the agent said: {said[:200] or 'nothing'}",
            "the context is empty now",
        ]
    cards = [f"  {card.question} -> {card.answer}" for card in record.flashcards]
    losses = f"loss {record.loss_before:.2f} -> {record.loss_after:.2f} nats a token in {_plural(record.steps, 'step')}, {record.seconds:.1f} s"
    unused = f"; {_plural(record.rejected_flashcards, 'item')} unusable" if record.rejected_flashcards else ""
    if record.outcome == "rolled_back":
        return [f"rolled back {_plural(len(cards), 'flashcard')}: {record.reason}", *cards]
    return [
        f"wrote {_plural(len(cards), 'flashcard')} into revision {record.revision}: {losses}{unused}; the context is empty now",
        *cards,
    ]


def _shown(reply: Reply) -> str:
    text = reply.text.strip() or "(no answer)"
    return (
        text
        if reply.finish_reason == "stop"
        else f"{text} (cut off at {_plural(reply.reply_tokens, 'token')})"
    )


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
