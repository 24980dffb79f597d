"""Plays one task of an environment with a user's own replies, and prints what an agent would see.

    replies --> TriedActor --> the loop of a real episode (episode.play), its session and its memory
                    |
                    +--> View: each context turn by turn, what a full one extracts, the score

It needs a tokenizer, and neither Ray nor weights: nothing is sampled and nothing is written. Where the
environment knows the flashcards of a text, these are extracted; a person may type them instead.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from actors.environments.base import Demonstrator, Environment, Split, prepare
from actors.environments.build import build_environment
from actors.episodes.demonstration import gold_flashcards
from actors.episodes.episode import events_of, play
from actors.episodes.hosted_session import HostedSession
from actors.memory.base import Agent, Memory
from actors.memory.build import build_memory, surroundings
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat, Ids, open_chat
from actors.text.flashcards import parse_flashcards, render_flashcards
from actors.types import (
    FastWeights,
    Flashcard,
    Generation,
    Outcome,
    PolicyVersion,
    SpanKind,
    StopReason,
    Task,
    WriteExample,
    WriteRequest,
    WriteResult,
)
from cluster.common.printable import visible
from cluster.common.quiet import quiet
from cluster.common.tasks import TaskSource
from cluster.inspection.terminal import number_text, scores_text
from configs.bounds import ConfigError
from configs.memory import CARD_WRITING, SUMMARIZING
from configs.models import tokenizer_folder
from configs.schema import RunConfig

_ASKING = (*CARD_WRITING, *SUMMARIZING, "custom")  # memories whose request may hold the task's question
_DIM, _HEADING = "dim", "bold cyan"
_TITLES = {"system": "system prompt", "user": "told or asked", "assistant": "reply (not its own)"}


@dataclass(frozen=True, slots=True)
class Trial:
    """Which task is played. ``every_token``: also print each token with its id."""

    split: Split
    position: int
    every_token: bool


class Replies:
    """What the agent says, in turn. Without any left it says nothing, as a model may too."""

    def __init__(self, texts: Sequence[str] | None, ask: Callable[[str], str | None] | None = None) -> None:
        """``ask``: types a reply to a prompt, None where nobody does any more."""
        self._texts: Iterator[str] = iter(texts or ())
        self._ask = ask

    @property
    def are_typed(self) -> bool:
        return self._ask is not None

    def following(self, prompt: str) -> str | None:
        """The next reply, None without one."""
        return self._ask(prompt) if self._ask is not None else next(self._texts, None)


def read_replies(path: Path) -> list[str]:
    """The replies of a file, one a line; a line in JSON's quotes may hold line breaks. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"argument --replies: {path} cannot be read ({reason})") from None
    return [_reply_in(line) for line in lines]


def typed_reply(prompt: str) -> str | None:
    """Read a reply from the standard input. The prompt is shown to people only."""
    if sys.stdin.isatty():
        sys.stdout.write(f"{prompt}> ")
        sys.stdout.flush()
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def try_task(config: RunConfig, trial: Trial, replies: Replies, console: Console) -> None:
    """Play one task. Raises TaskError or MemoryFault for a fault, with the user's file and line."""
    with quiet(verbose=False):  # what the environment prints is the user's, and stays
        chat = open_chat(tokenizer_folder(config.model), config.model)
    try:
        environment = build_environment(config.environment, config.embedder)
    except ValueError as error:  # settings that only the environment can judge
        raise TaskError(str(error)) from error
    prepare(environment)
    task = TaskSource(environment, trial.split, config.seed).at(trial.position)
    window = config.engine.max_model_tokens
    around = surroundings(window, config.sampling.max_answer_tokens, config.embedder)
    memory = build_memory(config.memory, config.write, around)
    view = View(chat, config, trial, memory, console)
    asyncio.run(_played(config, environment, task, chat, replies, memory, view))


async def _played(
    config: RunConfig,
    environment: Environment,
    task: Task,
    chat: ChatFormat,
    replies: Replies,
    memory: Memory,
    view: View,
) -> None:
    if replies.are_typed:  # asyncio's own handler waits for the loop, which waits for a line
        signal.signal(signal.SIGINT, signal.default_int_handler)
    async with HostedSession(environment, task, config.rollout.environment_timeout_s) as session:
        await session.start()
        view.begin(task, session)
        actor = TriedActor(config, environment, task, chat, replies, view)
        agent = Agent(actor, session.told_tools(chat), session.system_prompt, session.question)
        try:
            stop = await play(
                agent, session, memory, config.sampling.max_answer_tokens, config.rollout.max_turns
            )
        finally:
            view.see(agent.context.ids)  # what was read since the last reply, also before a fault
        outcome = await session.outcome()
    view.end(agent, stop, outcome, session.cleaned, events_of(memory, task.id))


class TriedActor:
    """The Actor of a trial: its texts are given, and a write changes nothing."""

    def __init__(
        self,
        config: RunConfig,
        environment: Environment,
        task: Task,
        chat: ChatFormat,
        replies: Replies,
        view: View,
    ) -> None:
        self.version: PolicyVersion = 0
        self.weights = FastWeights(basis_id="trial", revision=0, b={})
        self._config, self._environment, self._task = config, environment, task
        self._chat, self._replies, self._view = chat, replies, view
        self._given = 0

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        self._view.see(tuple(prompt_ids), asked=kind == "extract")
        text, origin = self._extraction(prompt_ids) if kind == "extract" else self._reply()
        ids = self._chat.reply(text)
        if len(ids) > max_tokens:
            setting = "memory.max_extract_tokens" if kind == "extract" else "sampling.max_answer_tokens"
            origin += f", cut: it has {len(ids)} tokens, and {setting} is {max_tokens}"
        ids = ids[:max_tokens]
        self._view.said(kind, ids, origin)
        ended = ids[-1] in self._chat.stop_token_ids
        return Generation(ids, (0.0,) * len(ids), "stop" if ended else "length")

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        """Count the write as accepted, so that the next extraction shows its cards as saved."""
        tokens = sum(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
        self._view.note(f"a write would train {len(examples)} example(s) of {tokens} tokens in all")
        request = WriteRequest(self._task.id, self.weights, tuple(examples))
        return request, WriteResult(self.weights, None, 0.0, 0.0, 0, 0.0, "accepted", "")

    def _reply(self) -> tuple[str, str]:
        self._given += 1
        text = self._replies.following(f"reply {self._given}")
        return ("", "no reply is left: it says nothing") if text is None else (text, f"reply {self._given}")

    def _extraction(self, prompt_ids: Sequence[int]) -> tuple[str, str]:
        config, environment = self._config, self._environment
        writes_cards = config.memory.policy in CARD_WRITING
        if writes_cards and isinstance(environment, Demonstrator):
            context = self._chat.decode(prompt_ids)
            cards = gold_flashcards(environment, self._task, context, config.memory)
            return render_flashcards(cards), f"the environment's own {len(cards)} flashcard(s)"
        nothing, why = ("[]", "no flashcards") if writes_cards else ("", "no text")
        if self._replies.are_typed:
            text = self._replies.following('flashcards, [{"question": ..., "answer": ...}]')
            if text:
                count = len(parse_flashcards(text, config.write.max_flashcards).cards)
                return text, f"typed, {count} flashcard(s)" if writes_cards else "typed"
        return nothing, f"{why}: the environment knows none, and a model would write its own"


class View:
    """Prints the contexts of an episode as they grow."""

    def __init__(
        self, chat: ChatFormat, config: RunConfig, trial: Trial, memory: Memory, console: Console
    ) -> None:
        self._chat, self._trial, self._console = chat, trial, console
        self._policy = config.memory.policy
        # the limit of a user's own memory is its own affair
        own = config.memory.max_context_tokens if self._policy != "custom" else None
        self._most: int | None = getattr(memory, "max_context_tokens", own)
        self._question_title = "question"
        if config.memory.policy in _ASKING:
            hidden = config.memory.question_blind
            self._question_title += (
                ", hidden from the extraction" if hidden else " that an extraction is shown"
            )
        self._seen: Ids = ()
        self._contexts = self._extractions = self._tokens = 0

    def begin(self, task: Task, session: HostedSession) -> None:
        self._print(f"{task.environment} · task {task.id} ({self._trial.split})", "bold")
        limit = "L_max" if self._policy != "full" else "engine.max_model_tokens less an answer"
        full = f", a context is full at {self._most} tokens ({limit})" if self._most is not None else ""
        self._print(f"memory {self._policy}{full}", _DIM)
        if session.question:
            self._print(f"{self._question_title}: {session.question}", _DIM)

    def see(self, ids: Ids, asked: bool = False) -> None:
        """Print what is new in a context. ``asked``: its last turn asks for a text to the memory."""
        if ids[: len(self._seen)] != self._seen or not self._seen:
            self._open(ids)
        start, self._seen = len(self._seen), ids
        turns = [turn for turn in self._chat.turns(ids) if turn.end > start]
        for place, turn in enumerate(turns):
            title = _TITLES.get(turn.role, turn.role)
            if asked and place == len(turns) - 1:
                self._extractions += 1
                title = "request of the memory"
                held = turn.start - len(self._chat.user_open)
                over = f"full: {held} tokens and the next turn are over {self._most}: "
                self.note(f"{over if self._most is not None else ''}the memory asks")
            self._print(f"{title}, {turn.end - max(start, turn.start)} tokens", _DIM)
            self._indented(turn.text, "")
        if len(ids) > start:
            self._tokens += len(ids) - start
            self._every_token(ids[start:])
            bound = (
                "" if asked or self._most is None else f" of {self._most}"
            )  # the request comes on top of a full context
            self._print(f"  context: {len(ids)}{bound} tokens", _DIM)

    def said(self, kind: SpanKind, ids: Ids, origin: str) -> None:
        """Print what the agent says behind what it has seen."""
        style = "bold magenta" if kind == "extract" else "bold green"
        name = "agent, to its memory" if kind == "extract" else "agent"
        self._print(f"{name}, {len(ids)} tokens ({origin})", _DIM)
        self._indented(self._chat.decode(ids), style)
        self._every_token(ids)
        self._tokens += len(ids)
        self._seen += ids

    def note(self, text: str) -> None:
        self._print(f"--- {text} ---", "yellow")

    def end(
        self, agent: Agent, stop: StopReason, outcome: Outcome, cleaned: int, events: Mapping[str, int]
    ) -> None:
        """Print the score, and what the episode was in tokens."""
        self._print("Score", _HEADING)
        for answer in outcome.answers:
            self._print(f"question  {answer.question}")
            self._print(f"answered  {answer.prediction!r}, gold {' | '.join(answer.gold)!r}", "")
            self._print(f"          {scores_text(answer.scores)}", _DIM)
        parts = f" ({scores_text(outcome.reward_parts)})" if outcome.reward_parts else ""
        self._print(f"reward {number_text(outcome.reward)}{parts}", "bold")
        if stop == "max_turns":
            self._print("the episode was ended by rollout.max_turns: it asks for more replies", "red")
        lines = [
            f"{self._tokens} tokens in {self._contexts} context(s)",
            f"{self._extractions} extraction(s)",
        ]
        lines += [f"{len(agent.writes)} write(s)"] if agent.writes else []
        lines += [f"{cleaned} text(s) that could not be encoded were cleaned"] if cleaned else []
        lines += [f"{name} {count}" for name, count in events.items()]
        self._print(", ".join(lines), _DIM)

    def _open(self, ids: Ids) -> None:
        if self._seen:
            self._print("--- context cleared, or cut to its newest tokens ---", "cyan")
        self._contexts += 1
        self._seen = ()
        self._print(f"Context {self._contexts}", _HEADING)

    def _every_token(self, ids: Sequence[int]) -> None:
        if self._trial.every_token:
            pieces = " ".join(f"{id}:{self._chat.piece(id)!r}" for id in ids)
            self._indented(pieces, _DIM)

    def _indented(self, text: str, style: str) -> None:
        for line in visible(text.strip()).splitlines() or ["(nothing)"]:
            self._print(f"  {line}", style)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(visible(text), style=style), soft_wrap=True)


def _reply_in(line: str) -> str:
    if line.startswith('"'):
        try:
            text = json.loads(line)
        except ValueError:
            return line
        return text if isinstance(text, str) else line
    return line
