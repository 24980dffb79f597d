"""Linked notes instead of a context (A-MEM, arXiv 2502.12110, section 3): the row "A-MEM".

    text --> note (keywords, tags, context by the model) --> near notes --> links, and updates of those notes
    question --> nearest notes and their links --> the context that the answer is sampled from

Our choices, where they differ from the paper or the paper is silent:

- A note is a text as the environment gives it: a few turns of a conversation. The paper's note is one turn.
  The number of a note is its time; dates stand in the texts.
- One prompt asks for links and updates of all neighbours, as the paper's code does. Only a linked note may
  change. The prompt shows at most ``max_note_tokens`` tokens of a note. Links go both ways.
- The embedded text begins with context, keywords and tags. An embedder reads only so far (MiniLM 256 tokens),
  and what the model wrote must count.
- An action turn becomes a note with its reply when the next text comes. So does what that turn observed,
  e.g. search results. Nothing stays in the context. The last answer becomes no note: nobody would read it.
- Notes are written without the question, as in the paper. So ``question_blind`` changes nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from actors.memory.base import Agent
from actors.memory.note_text import (
    Attributes,
    Mention,
    Note,
    as_json,
    connecting_prompt,
    exchange,
    parse_attributes,
    parse_mentions,
    recollection,
    render,
    writing_prompt,
)
from actors.text.chat_template import ChatFormat
from actors.text.retrieval import Embedder, Hit, VectorIndex
from actors.text.split_text import split_text
from configs.schema import MemoryConfig

_T = TypeVar("_T")


class NotesMemory:
    """The row "A-MEM". All that was read is in the notes; the context holds at most the turn just answered.

    events:
        notes                     notes written
        plain_notes               the model gave no keyword, tag or context
        partial_notes             the model gave some of the three
        links, evolved            links made, and notes changed by one
        malformed_links           an answer that is not in the form
        refused_links             a link to the note itself, or to a note that was not shown
        recalls                   contexts opened with notes
        retrieved, linked         notes shown because they are near, or linked to a near one
        cut, left_out             notes shown in part, or left out, because of L_max
    """

    def __init__(self, config: MemoryConfig, embedder: Callable[[], Embedder]) -> None:
        self.events: Counter[str] = Counter()
        self._limit = config.max_context_tokens
        self._config = config.notes
        self._embedder = embedder
        self._index: VectorIndex | None = None  # note n stands at place n - 1
        self._notes: list[Note] = []
        self._answered = ""  # the last turn with its reply, not yet a note

    async def read(self, agent: Agent, text: str) -> None:
        await self._note_exchange(agent)
        await self._note_all(agent, text)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        await self._note_exchange(agent)
        turn = agent.turn(text)
        agent.clear(await self._recall(agent, text, self._limit - len(agent.context) - len(turn)))
        agent.context.observe(turn)
        reply = await agent.reply("act", max_tokens)
        self._answered = exchange(text, reply)
        return reply

    async def _note_exchange(self, agent: Agent) -> None:
        answered, self._answered = self._answered, ""
        if answered:
            agent.clear()
            await self._note_all(agent, answered)

    async def _note_all(self, agent: Agent, text: str) -> None:
        for piece in split_text(text, lambda piece: len(agent.chat.user(piece)), self._limit):
            if piece.strip():
                await self._note(agent, piece.strip())

    async def _note(self, agent: Agent, content: str) -> None:
        """Write a note, then link it to its neighbours and let them evolve."""
        answer = await agent.aside(writing_prompt(content), "extract", self._config.max_note_tokens)
        attributes = parse_attributes(answer)
        complete = attributes.keywords and attributes.tags and attributes.context
        plain = attributes == Attributes()
        self.events["notes"] += 1
        self.events["plain_notes"] += plain
        self.events["partial_notes"] += not plain and not complete
        note = Note(len(self._notes) + 1, content, attributes)
        # search before the note is added: otherwise it would be its own nearest neighbour
        near = await self._search(note.embedded, self._config.neighbours)
        await self._use_index(lambda index: index.add([note.embedded]))
        self._notes.append(note)
        if near:
            await self._connect(agent, note, [self._notes[hit.place] for hit in near])

    async def _connect(self, agent: Agent, note: Note, neighbours: Sequence[Note]) -> None:
        """Ask which neighbours belong with ``note``; link those, and bring their descriptions up to date."""
        room = min(self._config.max_note_tokens, self._limit // (1 + len(neighbours)))
        new, *earlier = (self._as_json(agent.chat, each, room) for each in (note, *neighbours))
        prompt = connecting_prompt(new, earlier)
        mentions = parse_mentions(await agent.aside(prompt, "extract", self._config.max_note_tokens))
        if mentions is None:
            self.events["malformed_links"] += 1
            return
        numbers = {neighbour.number for neighbour in neighbours}
        for mention in mentions:
            if mention.number in numbers:
                self._link(note.number, mention.number)
                await self._evolve(mention)
            else:
                self.events["refused_links"] += 1

    def _as_json(self, chat: ChatFormat, note: Note, room: int) -> str:
        """Return the note as JSON of about ``room`` tokens: the end of its content is cut."""
        frame = len(chat.encode(as_json(note, "")))
        return as_json(note, _beginning(note.content, room - frame, chat))

    def _link(self, one: int, other: int) -> None:
        for number, target in ((one, other), (other, one)):
            note = self._notes[number - 1]
            self._notes[number - 1] = replace(note, links=(*note.links, target))
        self.events["links"] += 1

    async def _evolve(self, mention: Mention) -> None:
        """Give a note its new tags and context, where there are any. From now on it is found by them."""
        old = self._notes[mention.number - 1]
        attributes = replace(
            old.attributes,
            tags=mention.tags or old.attributes.tags,
            context=mention.context or old.attributes.context,
        )
        if attributes == old.attributes:
            return
        note = replace(old, attributes=attributes)
        self._notes[mention.number - 1] = note
        await self._use_index(lambda index: index.replace(note.number - 1, note.embedded))
        self.events["evolved"] += 1

    async def _recall(self, agent: Agent, text: str, room: int) -> str:
        """Return the notes for ``text`` that fit into ``room`` tokens as a user turn; "" when there are none.

        Notes are chosen nearest first, each followed by its links, and shown oldest first. The note that
        fills the room is cut, and the notes after it are left out.
        """
        if not self._notes:
            return ""
        ranking = [hit.place + 1 for hit in await self._search(text, len(self._notes))]
        near = ranking[: self._config.retrieved]
        wanted = _with_links(near, ranking, self._notes, self._config.neighbours)
        shown: dict[int, str] = {}
        for number in wanted:
            note = self._notes[number - 1]
            frame = len(agent.chat.user(recollection({**shown, number: render(note, "")})))
            content = _beginning(note.content, room - frame, agent.chat)
            longer = {**shown, number: render(note, content)}
            # measured again: joined texts may take more tokens than their parts
            if len(agent.chat.user(recollection(longer))) > room:
                break
            shown = longer
            if content != note.content:
                self.events["cut"] += 1
                break
        self.events["recalls"] += 1
        self.events["retrieved"] += len(shown.keys() & set(near))
        self.events["linked"] += len(shown.keys() - set(near))
        self.events["left_out"] += len(wanted) - len(shown)
        return recollection(shown) if shown else ""

    async def _search(self, text: str, count: int) -> list[Hit]:
        return await self._use_index(lambda index: index.search(text, count))

    async def _use_index(self, work: Callable[[VectorIndex], _T]) -> _T:
        """Do ``work`` in a thread: other episodes run on this event loop.

        An embedding takes 10 to 80 ms; loading the embedder takes seconds.
        """

        def use() -> _T:
            if self._index is None:
                self._index = VectorIndex(self._embedder())
            return work(self._index)

        return await asyncio.to_thread(use)


def _with_links(near: Sequence[int], ranking: Sequence[int], notes: Sequence[Note], most: int) -> list[int]:
    """Return ``near``, each note followed by at most ``most`` of its links; each note once.

    Links that come first in ``ranking`` are taken first.
    """
    rank = {number: place for place, number in enumerate(ranking)}
    wanted: dict[int, None] = {}
    for number in near:
        links = sorted(notes[number - 1].links, key=rank.__getitem__)
        wanted.update(dict.fromkeys([number, *links[:most]]))
    return list(wanted)


def _beginning(text: str, tokens: int, chat: ChatFormat) -> str:
    """Return as many whole words of ``text`` as fit into ``tokens`` tokens."""
    ids = chat.encode(text)
    if len(ids) <= tokens:
        return text
    return " ".join(chat.decode(ids[: max(0, tokens)]).split(" ")[:-1])
