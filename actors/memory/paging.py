"""Paging: a context that is managed like an operating system's memory (MemGPT, arXiv 2310.08560).

    | system prompt | instructions, core memory, summary, counts | oldest turn ... newest turn |  <= L_max
                      |            |                               |
       tool calls ----+            +---- recursive summary <-------+ flush
       of the agent  <---- archival storage, recall storage

Over ``warn_fraction`` of L_max (max_context_tokens), an alert lets the agent save what matters by tool calls.
A flush that comes sooner has its alert too. Over L_max the oldest turns leave. A summary of the old summary
and of these turns takes their place, and the context is built anew, which ends the segment.

Our choices, where the paper is silent, or where a segment would not be what the engine saw:

- A call writes core memory at once. Its place in the prompt is renewed when the context is built anew; until
  then the call and its result stand among the turns.
- An alert and its calls leave when the alert is over: small models go on repeating them. Other calls and
  results leave at the next flush. None of them is summarised: what they saved is saved.
- Core memory, the summary, a turn and a result have at most a quarter each of the room that L_max leaves. So
  a question and a result always fit.
- The task block of core memory begins with the episode's question, unless question-blind.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.memory.base import Agent
from actors.memory.paging_tools import BLOCKS, Storage, parse_call
from actors.protocols import TaskError
from actors.text.chat_template import Ids
from actors.text.retrieval import Embedder
from actors.text.split_text import split_text
from actors.types import SpanKind
from configs.schema import MemoryConfig

_OPENING = """Your context is short, so you have a memory and tools for it. \
To call a tool reply with one JSON object and nothing else:
{{"call": "core_append", "block": "facts", "text": "..."}} adds to core memory, which you always see
{{"call": "core_replace", "block": "facts", "old": "...", "new": "..."}} changes it
{{"call": "archival_insert", "text": "..."}} stores a text
{{"call": "archival_search", "query": "...", "page": 1}} finds stored texts by meaning
{{"call": "recall_search", "query": "...", "page": 1}} finds earlier messages by words
Any other reply is your answer.
{core}
Summary of what left the context: {summary}
Recall storage: {messages} messages, {gone} turns left the context. Archival storage: {archived} texts."""
_BLOCK = "Core memory, block {name}: {text}"
_EMPTY = "(empty)"
_ALERT = (
    "System alert: your context is {percent}% full and the oldest messages above will leave it. "
    "Save the facts that matter, one call a reply, as in "
    '{{"call": "core_append", "block": "facts", "text": "..."}} or with archival_insert. '
    'Reply "done" when nothing is left to save.'
)
_ASK = "No more tool calls are possible now. Give your answer."
_SUMMARIZE = """{task}Your summary so far: {summary}

What came next and leaves your context now:
{text}

Write the new summary that replaces the old one: \
keep what is still useful of it and add the new facts (who, what, when, where). Be brief."""
_TASK = "It should help with: {question}\n\n"
_SLACK = 32  # tokens: the digits of counts, and joined texts that are a little longer than their parts
_LEAST_SHARE = 32  # tokens


class PagingMemory:
    """The row "MemGPT".

    Invariant: a prompt never holds more than L_max tokens and the opening of a reply, whatever the
    environment tells, a search finds, or the model writes.
    """

    def __init__(self, config: MemoryConfig, embedder: Callable[[], Embedder]) -> None:
        self._config = config
        self._embedder = embedder
        self._events: Counter[str] = Counter()
        self._pager: _Pager | None = None  # built with the first text: it measures with the agent's tokenizer

    @property
    def events(self) -> Mapping[str, int]:
        return self._events

    async def read(self, agent: Agent, text: str) -> None:
        """Take in ``text``. Raises TaskError if L_max holds hardly more than the instructions."""
        await self._of(agent).read(text)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        """Return the first reply that is no tool call. Raises TaskError as ``read`` does."""
        return await self._of(agent).answer(text, max_tokens)

    def _of(self, agent: Agent) -> _Pager:
        self._pager = self._pager or _Pager(self._config, agent, self._embedder, self._events)
        return self._pager


@dataclass(frozen=True, slots=True)
class _Turn:
    """One turn of the queue. ``text`` goes into summaries; it is "" for alerts, tool calls and results."""

    ids: Ids
    text: str


class _Pager:
    """The queue manager and function executor of one episode.

    ``_queue`` holds the turns behind the context's opening. ``_queue[_current:]`` is the turn that is being
    answered, with its calls and results; it is empty between answers.
    """

    def __init__(
        self, config: MemoryConfig, agent: Agent, embedder: Callable[[], Embedder], events: Counter[str]
    ) -> None:
        self._config = config
        self._paging = config.paging
        self._agent = agent
        self._events = events
        self._question = "" if config.question_blind else agent.question
        self._share, self._full = self._measures()
        self._storage = Storage(config.paging, embedder, self._tokens, self._share, events)
        self._storage.set_task(self._question)
        self._summary = ""
        self._queue: list[_Turn] = []
        self._current = 0
        self._gone = 0  # turns that left the context
        self._warned = False  # since the last flush
        self._rebuild((), ())

    async def read(self, text: str) -> None:
        await self._take_in(self._turns(text))
        self._storage.remember(text)
        await self._make_room(0)

    async def answer(self, text: str, max_tokens: int) -> str:
        *first, last = self._turns(text)
        await self._take_in(first)
        await self._make_room(len(last.ids))
        self._add(last)  # _current stays in front of it, so a flush keeps it until it is answered
        answer = await self._replies("act", max(max_tokens, self._paging.max_call_tokens))
        if answer is None:
            self._events["forced_answers"] += 1
            self._tell(_ASK)
            await self._shrink()
            answer = await self._reply("act", max_tokens)
            self._queue[-1] = _Turn(self._queue[-1].ids, f"You replied: {answer}")
        self._current = len(self._queue)
        answer = self._cut(answer, max_tokens)
        self._storage.remember(text)
        self._storage.remember(f"You replied: {answer}")
        return answer

    async def _take_in(self, turns: Sequence[_Turn]) -> None:
        for turn in turns:
            await self._make_room(len(turn.ids))
            self._add(turn)
            self._current = len(self._queue)

    async def _make_room(self, incoming: int) -> None:
        """Alert and flush as needed for a turn of ``incoming`` tokens. Only between answers."""
        context = self._agent.context
        pressed = len(context) > self._paging.warn_fraction * self._config.max_context_tokens
        due = pressed or len(context) + incoming > self._full
        # a long answer may have left no room for an alert
        if due and self._queue and not self._warned and len(context) <= self._full:
            await self._alert()
        if len(context) + incoming > self._full:
            await self._flush(incoming)

    async def _alert(self) -> None:
        self._events["warnings"] += 1
        self._warned = True
        percent = round(100 * len(self._agent.context) / self._config.max_context_tokens)
        self._tell(_ALERT.format(percent=percent))
        before = len(self._queue)
        await self._replies("extract", self._paging.max_call_tokens)
        if len(self._queue) == before + 1:  # one reply, and no call
            self._events["unused_warnings"] += 1
        self._rebuild([turn for turn in self._queue if turn.text], ())

    async def _replies(self, kind: SpanKind, max_tokens: int) -> str | None:
        """Let the agent call tools. Return its first reply that is no call.

        Returns None when the agent has made all its calls, or when the calls of an alert filled the context.
        """
        for _ in range(self._paging.max_calls):
            if kind == "act":
                await self._shrink()
            elif len(self._agent.context) > self._config.max_context_tokens:
                return None
            text = await self._reply(kind, max_tokens)
            call = parse_call(text)
            if call is None:
                if kind == "act":
                    self._queue[-1] = _Turn(self._queue[-1].ids, f"You replied: {text}")
                return text
            # in a thread: an embedder computes, and other episodes run on this event loop
            self._tell(await asyncio.to_thread(self._storage.run, call))
        return None

    async def _reply(self, kind: SpanKind, max_tokens: int) -> str:
        context = self._agent.context
        start = len(context)
        text = await self._agent.reply(kind, max_tokens)
        self._queue.append(_Turn(context.ids[start:], ""))
        return text

    def _tell(self, text: str) -> None:
        self._add(_Turn(self._agent.chat.user(text), ""))

    def _add(self, turn: _Turn) -> None:
        self._agent.context.observe(turn.ids)
        self._queue.append(turn)

    async def _shrink(self) -> None:
        """Flush when calls and results filled the context before the answer came."""
        if len(self._agent.context) > self._config.max_context_tokens:
            await self._flush(0)

    async def _flush(self, incoming: int) -> None:
        """Evict the oldest turns, summarise them, and begin a new context with the rest.

        Keeps turns up to ``flush_fraction`` of the room for turns, less where ``incoming`` tokens need more.
        """
        self._events["flushes"] += 1
        self._warned = False
        turns = self._full - len(self._opening("")) - self._share  # room for turns beside the longest summary
        settled, current = self._queue[: self._current], self._queue[self._current :]
        # the question stays, and so does the newest turn; the oldest calls and results between them go
        while len(current) > 2 and _size(current) > turns:
            del current[1]
        room = min(int(self._paging.flush_fraction * turns), turns - incoming) - _size(current)
        kept: list[_Turn] = []
        # settled calls and results (no text) are dropped whatever the room, and do not end the loop
        while settled and (not settled[-1].text or len(settled[-1].ids) <= room):
            turn = settled.pop()
            if turn.text:
                kept.insert(0, turn)
                room -= len(turn.ids)
        evicted = [turn.text for turn in settled if turn.text]
        self._gone += len(evicted)
        self._events["evicted_turns"] += len(evicted)
        await self._summarize("\n".join(evicted))
        self._rebuild(kept, current)

    async def _summarize(self, text: str) -> None:
        """Summarise the old summary and ``text`` (section 2.2), in as many steps as the window needs."""
        chat = self._agent.chat
        while text:
            prompt = self._summary_prompt
            frame = len(chat.opening(self._agent.system_prompt, prompt("")))
            part = split_text(text, self._tokens, self._config.max_context_tokens - frame - _SLACK)[0]
            text = text[len(part) :].strip()
            longest = min(self._share, self._config.max_summary_tokens)
            written = (await self._agent.aside(prompt(part), "extract", longest)).strip()
            self._events["summaries" if written else "empty_summaries"] += 1
            self._summary = self._first(written, self._share) if written else self._summary

    def _summary_prompt(self, text: str) -> str:
        task = _TASK.format(question=self._first(self._question, self._share)) if self._question else ""
        return _SUMMARIZE.format(task=task, summary=self._summary or _EMPTY, text=text)

    def _rebuild(self, settled: Sequence[_Turn], current: Sequence[_Turn]) -> None:
        """End the segment and begin a new context with these turns.

        A reply that was sampled before is an observation in the new segment, so nothing is trained on twice.
        """
        self._agent.clear(self._memory_turn(self._summary))
        self._queue = [*settled, *current]
        self._current = len(settled)
        for turn in self._queue:
            self._agent.context.observe(turn.ids)

    def _memory_turn(self, summary: str) -> str:
        storage = self._storage
        core = {name: storage.core[name] for name in BLOCKS}
        return _memory_turn(core, summary, storage.messages, self._gone, storage.archived)

    def _opening(self, summary: str) -> Ids:
        chat = self._agent.chat
        return chat.opening(self._agent.system_prompt, self._memory_turn(summary))

    def _measures(self) -> tuple[int, int]:
        """Return two lengths in tokens: a share, and L_max less an alert. Raises TaskError.

        A share is a quarter of the room: core memory, the summary, a turn and a result have one each.
        """
        chat, limit = self._agent.chat, self._config.max_context_tokens
        empty = _memory_turn(dict.fromkeys(BLOCKS, ""), "", 0, 0, 0)
        opening = chat.opening(self._agent.system_prompt, empty)
        alert = len(chat.user(_ALERT.format(percent=100)))
        fixed = len(opening) + alert + _SLACK
        share = (limit - fixed) // 4
        if share < _LEAST_SHARE:
            raise TaskError(
                f"memory.max_context_tokens={limit}: the system prompt and the paging memory's instructions "
                f"take {fixed} of them, so give {fixed + 4 * _LEAST_SHARE} or more"
            )
        return share, limit - alert

    def _turns(self, text: str) -> list[_Turn]:
        """Return ``text`` as turns of at most a share each."""
        turn = self._agent.turn
        pieces = split_text(text, lambda piece: len(turn(piece)), self._share)
        return [_Turn(turn(piece), piece) for piece in pieces]

    def _cut(self, answer: str, max_tokens: int) -> str:
        """Bound an answer by ``max_tokens``: its reply may have been as long as a call."""
        ids = self._agent.chat.encode(answer)
        if len(ids) <= max_tokens:
            return answer
        self._events["cut_answers"] += 1
        return self._agent.chat.decode(ids[:max_tokens])

    def _first(self, text: str, limit: int) -> str:
        return split_text(text, self._tokens, limit)[0].strip()

    def _tokens(self, text: str) -> int:
        return len(self._agent.chat.encode(text))


def _memory_turn(core: Mapping[str, str], summary: str, messages: int, gone: int, archived: int) -> str:
    blocks = "\n".join(_BLOCK.format(name=name, text=text or _EMPTY) for name, text in core.items())
    return _OPENING.format(
        core=blocks, summary=summary or _EMPTY, messages=messages, gone=gone, archived=archived
    )


def _size(turns: Sequence[_Turn]) -> int:
    return sum(len(turn.ids) for turn in turns)
