"""A conversation on the real engine at the quickstart's settings: told facts are kept, others are left alone.

Only the flashcards are not the model's own: an untrained SmolLM2-135M seldom writes one that can be read.
What a trained policy does with its own cards is in the proof (infra/proof.sh chat).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.protocols import Policy
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import AdapterKey, Flashcard, Generation, Sampling
from cluster.assistant.conversation import Conversation
from cluster.assistant.opening import parts_of, prepare_opening
from cluster.assistant.tending import Edits, Rebuilt
from configs.shipped import shipped

pytestmark = pytest.mark.engine_in_process

# told, its two cards, their answer, and a question in words that neither the cards nor the telling use
FACTS = (
    (
        "Elena was born on April 10.",
        "When is Elena's birthday?",
        "On what date does Elena celebrate a birthday?",
        "April 10",
        "On which day was Elena born?",
    ),
    (
        "Walter works as a dentist.",
        "What is Walter's job?",
        "What does Walter do for a living?",
        "dentist",
        "What kind of work does Walter do?",
    ),
    (
        "Olivia adopted a hedgehog.",
        "What pet does Olivia have?",
        "Which animal lives with Olivia?",
        "hedgehog",
        "What animal does Olivia keep?",
    ),
    (
        "Nathan plays the cello.",
        "What instrument does Nathan play?",
        "On which instrument does Nathan make music?",
        "cello",
        "Which instrument does Nathan practice?",
    ),
)
STRANGERS = (
    "What is Zoe's job?",
    "What pet does Patrick have?",
    "When is Gloria's birthday?",
    "What instrument does Brian play?",
    "Where does Iris live?",
    "What does Howard do for a living?",
)


class GoldFlashcards:
    """The engine, except that an extraction is the gold cards of the facts that its context tells."""

    def __init__(self, engine: Policy, chat: ChatFormat) -> None:
        self._engine, self._chat = engine, chat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        if sampling.kind != "extract":
            return await self._engine.generate(prompt_ids, sampling, adapter)
        told = self._chat.decode(prompt_ids)
        cards = [Flashcard(question, fact[3]) for fact in FACTS if fact[0] in told for question in fact[1:3]]
        ids = self._chat.reply(render_flashcards(cards))
        return Generation(ids, (0.0,) * len(ids), "stop")


def test_four_facts_told_in_four_turns_are_known_in_other_words_and_left_alone_in_other_questions(
    tmp_path: Path,
) -> None:
    opening = prepare_opening("smollm2-135m", shipped()["quickstart"], ["rollout.threads=2"])
    with parts_of(opening, slots=1) as parts:
        gold = replace(parts, policy=GoldFlashcards(parts.policy, parts.chat))  # type: ignore[arg-type]
        conversation = Conversation(gold, "c", opening.system_prompt)
        with asyncio.Runner() as runner:
            said, strangers, without, writes = runner.run(_converse(conversation))
            tended = runner.run(_tend(conversation, tmp_path / "memory"))
    assert writes == [1, 2, 3, 4], "one revision for each told fact"
    right = [_names(answer, fact[3]) for answer, fact in zip(said, FACTS, strict=True)]
    assert sum(right) >= 3, said
    answers = [fact[3] for fact in FACTS]
    leaked = [reply for reply in strangers if any(_names(reply, answer) for answer in answers)]
    assert len(leaked) <= 4, strangers  # six without write.preserve, three with it
    assert not any(_names(answer, fact[3]) for answer, fact in zip(without, FACTS, strict=True)), without
    _check_tended(*tended)


def _check_tended(rebuilt: Rebuilt, replies: list[str], again: list[str]) -> None:
    """The forgotten fact is gone, the corrected one is right, and the two others are still known."""
    elena, walter, *others = replies
    assert not _names(elena, "April 10"), replies
    assert _names(walter, "pilot") and not _names(walter, "dentist"), replies
    assert sum(_names(reply, fact[3]) for reply, fact in zip(others, FACTS[2:], strict=True)) >= 1, replies
    assert [card.answer for card in rebuilt.cards] == ["pilot"] * 2 + ["hedgehog"] * 2 + ["cello"] * 2
    assert max(rebuilt.losses) < 0.5, rebuilt.losses  # by the engine, under the new Delta
    assert again == replies, "saved and loaded"


async def _tend(conversation: Conversation, folder: Path) -> tuple[Rebuilt, list[str], list[str]]:
    """Forget Elena's birthday, correct Walter's job; then save and load."""
    conversation.delta = True
    rebuilt = await conversation.tend(Edits(forget=(1, 2), correct={3: "pilot", 4: "pilot"}))
    answers: list[list[str]] = []
    for _ in range(2):
        replies = [await conversation.ask(fact[1], 8) for fact in FACTS]
        answers.append([reply.text for reply in replies])
        conversation.save(folder, overwrite=True)
        await conversation.load(folder)
    await conversation.close()
    first, again = answers
    return rebuilt, first, again


async def _converse(conversation: Conversation) -> tuple[list[str], list[str], list[str], list[int]]:
    for fact in FACTS:
        await conversation.say(fact[0], 8)
    await conversation.write()
    writes = [record.revision for record in conversation.writes if record.outcome == "accepted"]
    said = [await conversation.ask(fact[4], 8) for fact in FACTS]
    strangers = [await conversation.ask(question, 8) for question in STRANGERS]
    conversation.delta = False
    without = [await conversation.ask(fact[4], 8) for fact in FACTS]
    return (*([reply.text for reply in replies] for replies in (said, strangers, without)), writes)


def _names(reply: str, answer: str) -> bool:
    return answer.casefold() in " ".join(re.findall(r"\w+", reply.casefold()))
