"""A conversation in the terminal: reads lines, prints the answers, and shows each write with its flashcards.

A line that begins with / is a command; any other line is said to the agent. Lines come from the terminal or
from a pipe. Lines from a pipe are printed too, so that the output reads as a transcript. A turn that is
interrupted or fails is forgotten, and the conversation goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO, TypeVar

from actors.protocols import EngineError, ReceiptError, WriterError
from actors.types import WriteRecord
from cluster.assistant.conversation import Conversation, Reply
from cluster.assistant.memory_file import load_memory, require_place
from cluster.assistant.opening import AssistantError, Opening, parts_of
from cluster.assistant.tending import Edits, card_lines
from cluster.common.display import Display
from cluster.common.printable import plural

T = TypeVar("T")

_HELP = """/write             write what is in the context now, and clear it
/delta off|on      answer without, or with, what was written (the comparison)
/compare QUESTION  both answers side by side, from an empty context: what the weights alone know
/cards             the flashcards in the weights, numbered
/correct N ANSWER  give flashcard N the right answer; all that remain are written anew
/forget N          forget flashcard N; the others are written anew
/tell TEXT         something that wants no answer
/read FILE         read a text file; it is written in pieces where it is longer than the context
/save DIR          the memory as a PEFT adapter (safetensors), with all that is needed to go on
/load DIR          go on from a saved memory
/new               forget everything
/status            context, revision, Delta
/help, /quit"""
_MAX_FILE_BYTES = 2**20
_LONGER = {"sampling.max_answer_tokens": 256, "engine.max_model_tokens": 4096}


def chat(opening: Opening, memory: Path | None, source: TextIO, display: Display) -> int:
    """Talk until /quit or the end of ``source``; returns how many turns and commands failed.

    Raises EngineError if no engine starts, AssistantError if ``memory`` cannot be loaded and saved there.
    """
    home = None if memory is None else memory.expanduser()
    if home is not None and require_place(home):
        load_memory(home, opening)  # what is wrong with it is told before an engine starts
    display.say(f"loading {opening.title} ...")
    with parts_of(opening, slots=1) as parts, asyncio.Runner() as runner:
        conversation = Conversation(parts, "chat", opening.system_prompt)
        terminal = Terminal(conversation, opening, runner, display)
        if home is not None:
            terminal.live_in(home)
        window = opening.config.memory.max_context_tokens
        display.say(f"ready: a context of {window} tokens; /help lists the commands, /quit ends")
        terminal.converse(source)
        return terminal.failures


class Terminal:
    """The terminal of one conversation. ``runner`` runs a turn's coroutine; Ctrl-C cancels it."""

    def __init__(
        self, conversation: Conversation, opening: Opening, runner: asyncio.Runner, display: Display
    ) -> None:
        self.failures = 0
        self._conversation, self._runner, self._display = conversation, runner, display
        config = opening.config
        self._window = config.memory.max_context_tokens
        self._max_answer = config.sampling.max_answer_tokens
        self._timeout_s = config.assistant.request_timeout_s
        self._home: Path | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "write": self._write,
            "delta": self._delta,
            "compare": self._compare,
            "cards": self._cards,
            "correct": self._correct,
            "forget": self._forget,
            "tell": self._tell,
            "read": self._read,
            "save": self._save,
            "load": self._load,
            "new": self._new,
            "status": self._status,
            "help": lambda argument: self._note(_HELP),
        }

    def converse(self, source: TextIO) -> None:
        for line in self._lines(source):
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text:
                self._attempt(text)

    def live_in(self, folder: Path) -> None:
        """Go on from the memory in ``folder``, if there is one; from now on save there after every turn."""
        if require_place(folder):
            self._go_on_from(folder)
        else:
            self._note(f"{folder}: a new memory")
        self._home = folder
        self._conversation.save(folder, overwrite=True)
        self._note(f"saved in {folder} after every turn")

    def _load(self, argument: str) -> None:
        folder = self._folder(argument, "load")
        if self._home is not None:
            raise AssistantError(
                f"/load would replace the memory that lives in {self._home}; "
                f"start a chat with --memory {argument}, or one without --memory"
            )
        self._go_on_from(folder)

    def _go_on_from(self, folder: Path) -> None:
        conversation = self._conversation
        self._wait(conversation.load(folder), limited=False)
        cards = plural(len(conversation.cards), "flashcard")
        self._note(f"loaded {folder}: {cards}, revision {conversation.revision}")

    # --- turns and commands -----------------------------------------------------------------------------

    def _attempt(self, text: str) -> None:
        try:
            if text.startswith("/"):
                name, _, argument = text[1:].partition(" ")
                if name not in self._commands:
                    raise AssistantError(f"/{name} is no command; /help lists them")
                self._commands[name](argument.strip())
            else:
                self._say(text)
        except (AssistantError, EngineError, ReceiptError, WriterError) as error:
            self._fail(" ".join(str(error).split()))
        except TimeoutError:
            limit = f"assistant.request_timeout_s={self._timeout_s:g}"
            self._fail(f"no answer within {limit}; the turn is forgotten")
        except KeyboardInterrupt:
            self._note("interrupted: the turn is forgotten; /quit ends")
        self._keep()

    def _keep(self) -> None:
        if self._home is not None:
            try:
                self._conversation.save(self._home, overwrite=True)
            except AssistantError as error:
                self._fail(f"this turn is not saved: {error}")

    def _say(self, text: str) -> None:
        conversation = self._conversation
        if conversation.will_write(text):
            used = f"{conversation.context_tokens} of {self._window} tokens"
            self._note(f"the context is full ({used}): writing flashcards ...")
        reply = self._wait(conversation.say(text, self._max_answer))
        self._show_writes(reply.writes)
        self._display.say(f"agent> {_shown(reply, self._max_answer)}")

    def _write(self, argument: str) -> None:
        record = self._wait(self._conversation.write())
        if record is None:
            raise AssistantError("the context is empty: there is nothing to write")
        self._show_writes((record,))

    def _delta(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise AssistantError(f"/delta {argument}: must be on or off")
        self._conversation.delta = argument == "on"
        self._status("")

    def _compare(self, argument: str) -> None:
        if not argument:
            raise AssistantError("/compare needs a question")
        conversation = self._conversation
        was = conversation.delta
        try:
            for on in (False, True):
                conversation.delta = on
                reply = self._wait(conversation.ask(argument, self._max_answer))
                answer = _shown(reply, self._max_answer)
                self._note(f"{'with Delta   ' if on else 'without Delta'}: {answer}")
        finally:
            conversation.delta = was

    def _cards(self, argument: str) -> None:
        if not (cards := self._conversation.cards):
            self._note("nothing written yet")
        for line in card_lines(cards, self._display.console.width - 4):
            self._note(line)

    def _correct(self, argument: str) -> None:
        number, _, answer = argument.partition(" ")
        if not number.isdecimal() or not answer.strip():
            raise AssistantError("/correct needs a number of /cards and the answer: /correct 3 in Porto")
        self._tend(Edits(correct={int(number): answer}))

    def _forget(self, argument: str) -> None:
        numbers = argument.replace(",", " ").split()
        if not numbers or not all(number.isdecimal() for number in numbers):
            raise AssistantError("/forget needs numbers of /cards, e.g. /forget 3")
        self._tend(Edits(forget=tuple(map(int, numbers))))

    def _tend(self, edits: Edits) -> None:
        for line in self._wait(self._conversation.tend(edits), limited=False).lines():
            self._note(line)
        self._status("")

    def _tell(self, argument: str) -> None:
        if not argument:
            raise AssistantError("/tell needs a text")
        self._show_writes(self._wait(self._conversation.read(argument)))

    def _read(self, argument: str) -> None:
        path = Path(argument).expanduser()
        try:
            size = path.stat().st_size
            if size > _MAX_FILE_BYTES:
                raise AssistantError(f"{path}: has {size} bytes, at most {_MAX_FILE_BYTES} are read")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AssistantError(f"/read {argument}: cannot be read as UTF-8 text ({error})") from error
        self._show_writes(self._wait(self._conversation.read(text)))
        self._status("")

    def _save(self, argument: str) -> None:
        conversation = self._conversation
        conversation.save(self._folder(argument, "save"), overwrite=False)
        unwritten = plural(conversation.unwritten_tokens, "token")
        self._note(
            f"saved {argument}: revision {conversation.revision}, "
            f"{unwritten} of context not yet in the weights"
        )

    def _new(self, argument: str) -> None:
        self._wait(self._conversation.reset())
        self._status("")

    def _status(self, argument: str) -> None:
        conversation = self._conversation
        delta = "on" if conversation.delta else "off (answers are the base model's)"
        cards = plural(len(conversation.cards), "flashcard")
        self._note(
            f"context {conversation.context_tokens} of {self._window} tokens; "
            f"revision {conversation.revision}, {cards}; Delta {delta}"
        )

    # --- helpers ----------------------------------------------------------------------------------------

    def _wait(self, turn: Coroutine[Any, Any, T], limited: bool = True) -> T:
        """The result of ``turn``. Without a limit where many cards are written: Ctrl-C ends that."""
        console = self._display.console
        with console.status("...") if console.is_terminal else nullcontext():
            return self._runner.run(asyncio.wait_for(turn, self._timeout_s if limited else None))

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

    def _folder(self, argument: str, command: str) -> Path:
        if not argument:
            raise AssistantError(f"/{command} needs a folder")
        return Path(argument).expanduser()

    def _note(self, text: str) -> None:
        for line in text.split("\n"):
            self._display.say(f"  ~ {line}")

    def _fail(self, message: str) -> None:
        self.failures += 1
        self._display.say(f"error: {message}")


def describe_write(record: WriteRecord) -> list[str]:
    """Say what a write did: one line for the write, and one for each flashcard."""
    if record.outcome == "empty":
        extraction = " ".join(record.extraction.split())[:200] or "nothing"
        return [
            f"nothing written: {record.reason}; asked for flashcards the agent said: {extraction}",
            "the context is empty now",
        ]
    count = plural(len(record.flashcards), "flashcard")
    cards = [f"  {card.question} -> {card.answer}" for card in record.flashcards]
    if record.outcome == "rolled_back":
        return [f"rolled back {count}: {record.reason}", *cards]
    losses = f"loss {record.loss_before:.2f} -> {record.loss_after:.2f} nats a token"
    effort = f"{plural(record.steps, 'step')}, {record.seconds:.1f} s"
    unusable = (
        f"; {plural(record.rejected_flashcards, 'item')} unusable" if record.rejected_flashcards else ""
    )
    repaired = f"; {record.repaired_flashcards} repaired" if record.repaired_flashcards else ""
    written = f"wrote {count} into revision {record.revision}: {losses} in {effort}{unusable}{repaired}"
    return [f"{written}; the context is empty now", *cards]


def _shown(reply: Reply, most: int) -> str:
    """``most``: the tokens that an answer may have. One that is cut earlier has met the engine's window."""
    text = reply.text.strip() or "(no answer)"
    if reply.finish_reason == "stop":
        return text
    key = "sampling.max_answer_tokens" if reply.reply_tokens >= most else "engine.max_model_tokens"
    cut = f"cut off at {plural(reply.reply_tokens, 'token')}"
    return f"{text} ({cut}; for longer answers start with a larger {key}, e.g. {key}={_LONGER[key]})"
