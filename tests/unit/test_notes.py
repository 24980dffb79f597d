"""Linked notes (A-MEM) are written, linked both ways, evolve, and are found again with their links.

The embedder is the real one, the model is scripted.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.memory.base import Agent
from actors.memory.note_text import (
    Attributes,
    Mention,
    Note,
    parse_attributes,
    parse_mentions,
    writing_prompt,
)
from actors.memory.notes import NotesMemory
from actors.text.chat_template import ChatFormat
from actors.text.retrieval import Embedder, load_embedder
from actors.types import FastWeights, Flashcard, Generation, SpanKind, WriteExample, WriteRequest, WriteResult
from configs.schema import EmbedderConfig, MemoryConfig, NotesConfig
from tests.unit.rollout_fakes import sampled

NONE = "[]"
BREAD = "Ida: I baked rye bread and a plum cake on Sunday."
CAKE = "Tomas: Your cake was delicious, the best I ever had."
BOAT = "Ida: The engine of our boat is broken again."
STARS = "Vilma: We saw Saturn's rings through the telescope."
SAYINGS = {
    BREAD: '{"keywords": ["rye bread", "plum cake"], "tags": ["baking"], "context": "Ida bakes."}',
    CAKE: '{"keywords": ["cake"], "tags": ["food"], "context": "Tomas praises a cake."}',
    BOAT: '{"keywords": ["boat", "engine"], "tags": ["repairs"], "context": "Ida\'s boat needs repair."}',
    STARS: '{"keywords": ["Saturn", "telescope"], "tags": ["stars"], "context": "Vilma watches planets."}',
}


class _Actor:
    """Describes notes as ``sayings`` says, answers prompts about links in turn, and others with "Fine."."""

    def __init__(
        self, chat: ChatFormat, links: Sequence[str] = (), sayings: dict[str, str] | None = None
    ) -> None:
        self.version = 0
        self.weights = FastWeights("basis", 0, {})
        self.asked: list[tuple[str, str, int]] = []  # kind, prompt's text, most tokens
        self.prompts: list[tuple[int, ...]] = []
        self._chat = chat
        self._links = list(links)
        self._sayings = SAYINGS if sayings is None else sayings

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        text = self._chat.decode(prompt_ids)
        self.asked.append((kind, text, max_tokens))
        self.prompts.append(tuple(prompt_ids))
        return sampled(self._chat.reply(self._says(text, kind)))

    def _says(self, text: str, kind: SpanKind) -> str:
        if kind == "act":
            return "Fine."
        for content, saying in self._sayings.items():
            if writing_prompt(content) in text:
                return saying
        if "New note:" not in text:
            return "{}"
        return self._links.pop(0) if self._links else NONE

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        raise AssertionError("notes write no weights")


def _embedder() -> Embedder:
    return load_embedder(EmbedderConfig())


def _told(
    actor: _Actor, chat: ChatFormat, texts: Sequence[str], limit: int = 4096, **notes: int
) -> tuple[NotesMemory, Agent]:
    config = MemoryConfig(policy="notes", max_context_tokens=limit, notes=NotesConfig(**notes))
    memory = NotesMemory(config, _embedder)
    agent = Agent(actor, chat, "Be brief.", "What is the task?")

    async def story() -> None:
        for text in texts:
            await memory.read(agent, text)
            assert agent.context.ids == chat.system("Be brief.")  # cleared every turn

    asyncio.run(story())
    return memory, agent


def _answered(memory: NotesMemory, agent: Agent, actor: _Actor, question: str) -> str:
    """The prompt that the answer is sampled from."""
    assert asyncio.run(memory.answer(agent, question, 16)) == "Fine."
    kind, prompt, most = actor.asked[-1]
    assert (kind, most) == ("act", 16)
    return prompt


def test_each_text_becomes_a_note_that_the_model_describes_without_the_question(chat: ChatFormat) -> None:
    actor = _Actor(chat)
    memory, agent = _told(actor, chat, [BREAD, STARS])
    assert [kind for kind, _, _ in actor.asked] == ["extract"] * 3  # the first note has no neighbours
    assert all("What is the task?" not in prompt for _, prompt, _ in actor.asked)
    assert {most for _, _, most in actor.asked} == {NotesConfig().max_note_tokens}
    shown = actor.asked[2][1]
    assert f'{{"id": 1, "context": "Ida bakes.", "tags": ["baking"], "text": "{BREAD}"}}' in shown
    assert '{"id": 2' in shown
    assert memory.events == {"notes": 2, "plain_notes": 0, "partial_notes": 0}
    assert len(agent.segments) == 3
    for segment, ids in zip(agent.segments, actor.prompts, strict=True):
        assert tuple(segment.token_ids[: len(ids)]) == ids  # what the engine saw
        (span,) = segment.spans
        assert (span.start, span.kind) == (len(ids), "extract")
        assert segment.action_mask.sum() == span.end - span.start


def test_links_go_both_ways_and_are_brought_along(chat: ChatFormat) -> None:
    """The question is about the boat. The bread note comes because of the link, whichever note made it."""
    for texts, question in (([BREAD, BOAT], "Which engine?"), ([BOAT, BREAD], "Which engine?")):
        for answer, linked in (('[{"id": 1}]', 1), (NONE, 0)):
            actor = _Actor(chat, [answer])
            memory, agent = _told(actor, chat, texts, retrieved=1)
            prompt = _answered(memory, agent, actor, question)
            assert BOAT in prompt and (BREAD in prompt) == bool(linked)
            assert (memory.events["links"], memory.events["linked"]) == (linked, linked)
            assert memory.events["retrieved"] == 1


def test_a_neighbour_evolves_and_is_found_by_its_new_description(chat: ChatFormat) -> None:
    question = "Who studies astrophysics at the observatory in Chile?"
    context = "Ida studies astrophysics at an observatory."
    update = f'[{{"id": 1, "tags": ["observatory in Chile"], "context": "{context}"}}]'
    for answer, nearest in ((NONE, STARS), (update, BREAD)):
        actor = _Actor(chat, [answer, NONE])
        memory, agent = _told(actor, chat, [BREAD, CAKE, STARS], retrieved=1)
        prompt = _answered(memory, agent, actor, question)
        evolved = nearest == BREAD
        assert nearest in prompt and (STARS in prompt) != evolved
        assert (CAKE in prompt) == evolved  # which the update has linked
        assert (context in prompt) == evolved and "Ida bakes." not in prompt
        assert memory.events["evolved"] == evolved
        if evolved:
            assert "(keywords: rye bread, plum cake)" in prompt  # what the update did not name has stayed


def test_an_update_may_change_the_tags_alone(chat: ChatFormat) -> None:
    actor = _Actor(chat, ['{"id": "Note 1", "tags": ["friendship"], "context": "Ida bakes."}'])
    memory, agent = _told(actor, chat, [BREAD, CAKE])
    prompt = _answered(memory, agent, actor, "And then?")
    assert "(tags: friendship)" in prompt and "(tags: baking)" not in prompt and "Ida bakes." in prompt
    assert "malformed_links" not in memory.events


def test_only_the_near_notes_are_shown_for_linking(chat: ChatFormat) -> None:
    actor = _Actor(chat)
    _told(actor, chat, [STARS, BREAD, BOAT, CAKE], neighbours=1)
    shown = actor.asked[-1][1]
    assert '"id": 2,' in shown and '"id": 1,' not in shown and '"id": 3,' not in shown


def test_what_the_model_gets_wrong_is_counted_and_leaves_a_plain_note(chat: ChatFormat) -> None:
    sayings = {
        BREAD: "I am sorry, I cannot.",
        CAKE: '{"keywords": ["cake"]',
        BOAT: SAYINGS[BOAT],
        STARS: SAYINGS[STARS],
    }
    wrong_links = [
        "There are no links.",
        '[{"id": 3, "context": "Me."}, {"id": 9}, {"id": "x"}, {"id": 2, "tags": "cake, party"}, '
        '{"id": 2, "tags": ["again"]}',
        '[{"id": "Ida"}]',
    ]
    actor = _Actor(chat, wrong_links, sayings)
    memory, agent = _told(actor, chat, [BREAD, CAKE, BOAT, STARS])
    assert memory.events == {
        "notes": 4,
        "plain_notes": 1,
        "partial_notes": 1,
        "malformed_links": 2,
        "links": 1,
        "refused_links": 2,  # itself, and one that does not exist
        "evolved": 1,
    }
    prompt = _answered(memory, agent, actor, "And then?")
    assert f"Note 1\n{BREAD}" in prompt and "(keywords: cake) (tags: cake, party)" in prompt


@pytest.mark.parametrize(("limit", "several"), [(60, False), (200, False), (400, True)])
def test_the_recalled_notes_fit_and_the_nearest_come_first(
    chat: ChatFormat, limit: int, several: bool
) -> None:
    texts = [f"Day {day}: {'we walked on through the hills ' * 6}." for day in range(8)]
    texts.append(f"Ida: The boat is called Pelican. {'It sails. ' * 20}")
    actor = _Actor(chat)
    memory, agent = _told(actor, chat, texts, limit=limit)
    prompt = _answered(memory, agent, actor, "What is Ida's boat called?")
    assert len(actor.prompts[-1]) - len(chat.assistant_open) <= limit
    assert "Pelican" in prompt  # cut if need be
    events = memory.events
    assert events["retrieved"] + events["left_out"] == min(events["notes"], NotesConfig().retrieved)
    assert events["left_out"] > 0 and events["cut"] <= 1
    numbers = [int(line.split()[1].rstrip(":")) for line in prompt.splitlines() if line.startswith("Note ")]
    assert numbers == sorted(numbers)
    assert not several or events["retrieved"] > 1


def test_a_turn_too_long_for_any_note_is_answered_without(chat: ChatFormat) -> None:
    actor = _Actor(chat)
    memory, agent = _told(actor, chat, [BREAD], limit=40)
    prompt = _answered(memory, agent, actor, "word " * 60)
    assert BREAD not in prompt
    assert memory.events["left_out"] == memory.events["notes"] and memory.events["retrieved"] == 0


def test_an_answered_turn_becomes_a_note_for_the_next(chat: ChatFormat) -> None:
    actor = _Actor(chat)
    memory, agent = _told(actor, chat, [BREAD])
    first = _answered(memory, agent, actor, "Search or answer: which ship sank in 1912?")
    assert "which ship" in first and memory.events["notes"] == 1
    second = _answered(memory, agent, actor, "Results: the Titanic, a ship, sank in April 1912.")
    assert second.index("which ship sank in 1912?\nYou answered: Fine.") < second.index("Results:")
    assert memory.events["notes"] == 2
    asyncio.run(memory.read(agent, BOAT))
    third = _answered(memory, agent, actor, "When did the ship sink?")
    assert "sank in April 1912.\nYou answered: Fine." in third and memory.events["notes"] == 4
    agent.finish()
    kinds = [segment.spans[0].kind for segment in agent.segments]
    assert kinds == ["extract", "act", "extract", "extract", "act", *["extract"] * 4, "act"]
    assert all(len(segment.spans) == 1 for segment in agent.segments)


def test_a_long_text_becomes_several_notes_and_loses_nothing(chat: ChatFormat) -> None:
    text = "\n".join(f"Ida: this is line {i} of the long story." for i in range(40))
    memory, _ = _told(_Actor(chat), chat, [text, "  "], limit=128)
    assert memory.events["notes"] > 3
    assert "\n".join(note.content for note in memory._notes) == text
    assert all(len(chat.user(note.content)) <= 128 for note in memory._notes)


def test_the_loop_stays_free_while_texts_are_embedded(chat: ChatFormat) -> None:
    threads = set()

    class Watched:
        dimensions = _embedder().dimensions

        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            threads.add(threading.get_ident())
            return _embedder().embed(texts)

    memory = NotesMemory(MemoryConfig(policy="notes"), Watched)
    agent = Agent(_Actor(chat), chat, "Be brief.", "")
    asyncio.run(memory.read(agent, BREAD))
    asyncio.run(memory.answer(agent, "Which bread?", 16))
    assert threads and threading.get_ident() not in threads


def test_threads_share_the_embedder() -> None:
    """Without its lock, its tokenizer would raise "Already borrowed" now and then."""
    lengths = [1, 9, 40, 120] * 4
    texts = [" ".join(["boat"] * length) for length in lengths]
    alone = [_embedder().embed([text]) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: _embedder().embed([text]), texts))
    assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        (
            'Sure!\n```json\n{"keywords": ["a", "b"], "tags": ["t"], "context": "About \\u00e9."}\n```',
            Attributes(("a", "b"), ("t",), "About é."),
        ),
        (
            '{"keywords": "a, b, a", "tags": [], "context": "Line\nbreak"}',
            Attributes(("a", "b"), (), "Line break"),
        ),
        ('{"keywords": ["a", "b", "cut of', Attributes(("a", "b"))),
        (
            '"keywords": ["[x]", "say \\"hi\\""], "context": "no braces"',
            Attributes(("[x]", 'say "hi"'), (), "no braces"),
        ),
        ('{"keywords": ["..."], "tags": ["..."], "context": "..."}', Attributes()),  # the form, copied
        ('{"keywords": [1, {"a": 2}], "tags": null, "context": ["x"]}', Attributes()),
        ('{"keywords": ["\\ud800x", "\\q"], "context": "\\ud800"}', Attributes(("x", "\\q"))),
        ("[" * 100_000, Attributes()),
        ("", Attributes()),
    ],
)
def test_attributes_are_taken_as_far_as_they_are_in_form(text: str, attributes: Attributes) -> None:
    assert parse_attributes(text) == attributes


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        (
            '[{"id": 2, "context": "y", "tags": ["x"]}, {"id": 1}, {"id": 2}]',
            (Mention(2, ("x",), "y"), Mention(1, (), "")),
        ),
        (
            '```json\n{"id": "Note 4", "tags": "x"}\n{"id": "5", "context": "a {brace}", "text": "cut',
            (Mention(4, ("x",), ""), Mention(5, (), "a {brace}")),
        ),
        ('{"notes": [{"tags": ["y"]}, {"id":', None),
        ('[{"id": "Ida", "tags": []}]', None),
        ("None of them: [ ]", ()),
        ("id: 1, 2", None),
        ("", None),
    ],
)
def test_mentions_are_taken_as_far_as_they_are_in_form(
    text: str, mentions: tuple[Mention, ...] | None
) -> None:
    assert parse_mentions(text) == mentions


@settings(deadline=None)
@given(st.text(alphabet='{}[]",:\\ 1au', max_size=80) | st.text(max_size=60))
def test_no_answer_raises(text: str) -> None:
    openings = ("", '{"keywords": ', '[{"id": ', '[{"id": 1, "tags": ', '[{"id": 1, "context": ')
    for opening in openings:
        parse_attributes(opening + text)
        parse_mentions(opening + text)


def test_the_embedded_text_has_what_the_model_wrote_in_front() -> None:
    note = Note(1, "Content.", Attributes(("k",), ("t",), "Context."))
    assert note.embedded == "Context.\nk\nt\nContent."
