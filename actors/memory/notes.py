"""Linked notes instead of a context: every text becomes a note, notes link to near ones and change them, and are found by embedding.

Method: A-MEM, arXiv 2502.12110, section 3: note construction, link generation, memory evolution, retrieval. Our choices where ours differs or the
paper is silent:

- A note is a text as the environment tells it (a few turns of a conversation) where the paper's is one turn. The number of a note is its time; dates
  stand in the texts.
- Links and evolution are asked for in one prompt about all neighbours (as the paper's code does it), and only a note that is linked may change. The
  prompt shows a note by at most ``max_note_tokens`` tokens. Links go both ways.
- The embedded text has keywords, tags and context in front of the content: an embedder reads only so far (MiniLM 256 tokens), and what the model
  wrote must count.
- An action turn and its reply become a note when the next text comes, and so does what that turn observed (the results of a search, say): nothing
  stays in the context. After the last answer of an episode nothing can read such a note, and none is written.
- Notes are written without a sight of the question, as in the paper. ``question_blind`` therefore changes nothing.
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
    """The row "A-MEM". Between two texts the context is empty, but for a turn just answered; all that was read is in the notes.

    events: notes; plain_notes (the model named no keyword, tag or context) and partial_notes (not all three); links; evolved; malformed_links (an
    answer not in the form) and refused_links (to the note itself or one that was not shown); recalls, retrieved and linked (notes shown with a turn:
    near to it, or linked to one that is), cut and left_out (near or linked, but over L_max).
    """

    def __init__(self, config: MemoryConfig, embedder: Callable[[], Embedder]) -> None:
        self.events: Counter[str] = Counter()
        self._limit = config.max_context_tokens
        self._config = config.notes
        self._embedder = embedder
        self._index: VectorIndex | None = None  # of note n at place n - 1
        self._notes: list[Note] = []
        self._answered = ""  # the last turn with its reply, not yet a note

    async def read(self, agent: Agent, text: str) -> None:
        await self._note_exchange(agent)
        await self._note_all(agent, text)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        await self._note_exchange(agent)
        turn = agent.chat.user(text)
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
        self.events["notes"] += 1
        self.events["plain_notes"] += attributes == Attributes()
        self.events["partial_notes"] += attributes != Attributes() and not (
            attributes.keywords and attributes.tags and attributes.context
        )
        note = Note(len(self._notes) + 1, content, attributes)
        near = await self._search(note.embedded, self._config.neighbours)
        await self._use_index(lambda index: index.add([note.embedded]))
        self._notes.append(note)
        if near:
            await self._connect(agent, note, [self._notes[hit.place] for hit in near])

    async def _connect(self, agent: Agent, note: Note, neighbours: Sequence[Note]) -> None:
        room = min(self._config.max_note_tokens, self._limit // (1 + len(neighbours)))
        shown = [
            as_json(
                other,
                _beginning(other.content, room - len(agent.chat.encode(as_json(other, ""))), agent.chat),
            )
            for other in (note, *neighbours)
        ]
        mentions = parse_mentions(
            await agent.aside(connecting_prompt(shown[0], shown[1:]), "extract", self._config.max_note_tokens)
        )
        if mentions is None:
            self.events["malformed_links"] += 1
            return
        known = {other.number for other in neighbours}
        for mention in mentions:
            if mention.number in known:
                self._link(note.number, mention.number)
                await self._evolve(mention)
            else:
                self.events["refused_links"] += 1

    def _link(self, one: int, other: int) -> None:
        """Both ways."""
        for number, target in ((one, other), (other, one)):
            note = self._notes[number - 1]
            self._notes[number - 1] = replace(note, links=(*note.links, target))
        self.events["links"] += 1

    async def _evolve(self, mention: Mention) -> None:
        """The note's new tags and context, where there are any, replace the old ones, and it is found by them from now on."""
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
        """The notes for ``text`` that fit into ``room`` tokens as a user turn, oldest first; empty when there are none.

        Nearest first, each followed by its links; the one with which the room ends is cut, the rest is left out.
        """
        if not self._notes:
            return ""
        ranking = [hit.place + 1 for hit in await self._search(text, len(self._notes))]
        near = ranking[: self._config.retrieved]
        wanted = _with_links(near, ranking, self._notes, self._config.neighbours)
        shown: dict[int, str] = {}
        for number in wanted:
            note = self._notes[number - 1]
            taken = len(agent.chat.user(recollection({**shown, number: render(note, "")})))
            content = _beginning(note.content, room - taken, agent.chat)
            tried = {**shown, number: render(note, content)}
            if len(agent.chat.user(recollection(tried))) > room:
                break
            shown = tried
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
        """In a thread: an embedding takes 10 to 80 ms (its model seconds to load), and other episodes run on this loop."""

        def use() -> _T:
            if self._index is None:
                self._index = VectorIndex(self._embedder())
            return work(self._index)

        return await asyncio.to_thread(use)


def _with_links(near: Sequence[int], ranking: Sequence[int], notes: Sequence[Note], most: int) -> list[int]:
    """``near`` with, behind each, its links: at most ``most`` of them, those first that come first in ``ranking``; each note once."""
    rank = {number: place for place, number in enumerate(ranking)}
    wanted: dict[int, None] = {}
    for number in near:
        links = sorted(notes[number - 1].links, key=rank.__getitem__)
        wanted.update(dict.fromkeys([number, *links[:most]]))
    return list(wanted)


def _beginning(text: str, tokens: int, chat: ChatFormat) -> str:
    """As many whole words of ``text`` as ``tokens`` tokens hold."""
    ids = chat.encode(text)
    if len(ids) <= tokens:
        return text
    return " ".join(chat.decode(ids[: max(0, tokens)]).split(" ")[:-1])
