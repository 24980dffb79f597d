"""Demonstrations have the form of real episodes, and teach flashcards only."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from actors.environments.base import Exchange
from actors.environments.recall import RecallEnvironment
from actors.environments.recall_questions import subject_of
from actors.environments.recall_words import RELATIONS
from actors.episodes.demonstration import (
    Extraction,
    asked_by_lot,
    demonstrate,
    demonstrate_exchange,
    gold_cards,
)
from actors.episodes.episode import EpisodeSpec
from actors.episodes.rollout import WriteBatcher
from actors.memory.build import build_memory
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import parse_flashcards
from actors.types import AdapterKey, Generation, Sampling, Segment, Task, Trajectory
from configs.schema import MemoryConfig, RecallConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, run_episode, sampled

ENVIRONMENT = RecallEnvironment(
    RecallConfig(sessions=2, facts_per_session=4, questions=4, filler_sentences=1)
)
WINDOW = SURROUNDINGS.window_tokens
TASKS = list(itertools.islice(ENVIRONMENT.tasks("train", 0, 0), 10))


def _demonstrated(task: Task, chat: ChatFormat, memory: MemoryConfig) -> list[Segment]:
    cards_of = gold_cards(ENVIRONMENT, task, memory)
    return demonstrate(task, ENVIRONMENT, cards_of, chat, memory, WriteConfig(), WINDOW)


@pytest.mark.parametrize("blind", [False, True])
def test_the_mask_covers_the_gold_flashcards_only(chat: ChatFormat, blind: bool) -> None:
    memory = MemoryConfig(max_context_tokens=50, question_blind=blind)
    for task in TASKS:
        segments = _demonstrated(task, chat, memory)
        assert len(segments) >= 2  # one for each session, and one where the questions fill the context
        assert {span.kind for segment in segments for span in segment.spans} == {"extract"}
        for text, segment in zip(task.payload["sessions"], segments[:2], strict=True):
            gold = ENVIRONMENT.demonstrate_flashcards(task, text, blind)
            assert len(segment.spans) == 1
            taught = segment.token_ids[segment.action_mask]
            assert taught[-1] == chat.stop_token_ids[0]
            assert parse_flashcards(chat.decode(taught), 32).cards == gold
            assert not segment.logprobs.any() and (segment.policy_version, segment.revision) == (0, 0)


def test_two_wordings_are_two_cards_a_fact_side_by_side(chat: ChatFormat) -> None:
    memory = MemoryConfig(max_context_tokens=50, question_blind=True, wordings=2)
    task = TASKS[0]
    segments = _demonstrated(task, chat, memory)
    taught = parse_flashcards(chat.decode(segments[0].token_ids[segments[0].action_mask]), 32).cards
    gold = ENVIRONMENT.demonstrate_flashcards(task, task.payload["sessions"][0], question_blind=True)
    assert taught[::2] == gold and len(gold) == 4
    for card, other in zip(gold, taught[1::2], strict=True):
        assert other.answer == card.answer
        assert ENVIRONMENT.wordings(card.question) == (card.question, other.question)
    # A question-aware agent's first card has the words of the question, whichever of the two they are.
    aware = _demonstrated(task, chat, replace(memory, question_blind=False))
    cards = parse_flashcards(chat.decode(aware[0].token_ids[aware[0].action_mask]), 32).cards
    asked = {question["question"] for question in task.payload["questions"]}
    assert cards and all(card.question in asked for card in cards[::2])


def test_by_lot_a_card_keeps_its_person_and_answer_and_asks_any_of_the_nine_relations() -> None:
    memory, own, asked = MemoryConfig(question_blind=True), 0, set()
    tasks = list(itertools.islice(ENVIRONMENT.tasks("train", 1, 0), 60))
    for task in tasks:
        extraction = Extraction(task.payload["sessions"][0], "", "")
        gold, drawn = (source(ENVIRONMENT, task, memory)(extraction) for source in (gold_cards, asked_by_lot))
        assert drawn == asked_by_lot(ENVIRONMENT, task, memory)(extraction)  # the lot is the task's
        assert [card.answer for card in drawn] == [card.answer for card in gold]
        for card, other in zip(gold, drawn, strict=True):
            subject, of_other = subject_of(card.question), subject_of(other.question)
            assert subject is not None and of_other is not None and of_other.person == subject.person
            own += of_other == subject
            asked.add(of_other.relation.name)
    assert len(asked) == len(RELATIONS) == 9
    assert 0.05 < own / (4 * len(tasks)) < 0.2  # a ninth


def test_by_lot_the_second_wording_asks_what_the_first_asks() -> None:
    memory, task = MemoryConfig(question_blind=True, wordings=2), TASKS[0]
    drawn = asked_by_lot(ENVIRONMENT, task, memory)(Extraction(task.payload["sessions"][0], "", ""))
    assert len(drawn) == 8
    for card, other in zip(drawn[::2], drawn[1::2], strict=True):
        assert subject_of(other.question) == subject_of(card.question) and other.question != card.question


def test_an_exchange_teaches_its_last_answer_only(chat: ChatFormat) -> None:
    text, earlier, last = "Nora has moved to Lisbon.", ("Who?", "Nora"), ("Where does Nora live?", "Lisbon")
    segment = demonstrate_exchange(Exchange((text,), (earlier, last)), "Be brief.", chat, MemoryConfig())
    assert chat.decode(segment.token_ids[segment.action_mask]) == "Lisbon"
    assert segment.token_ids[segment.action_mask][-1] == chat.stop_token_ids[0]
    assert [(turn.role, turn.text) for turn in chat.turns(segment.token_ids.tolist())] == [
        ("system", "Be brief."),
        ("user", text),
        ("user", "Who?"),
        ("assistant", "Nora"),
        ("user", "Where does Nora live?"),
        ("assistant", "Lisbon"),
    ]


@pytest.mark.parametrize("window", [50, 90])
def test_a_real_episode_that_writes_the_gold_sees_the_same_tokens(chat: ChatFormat, window: int) -> None:
    task, memory = TASKS[0], MemoryConfig(max_context_tokens=window)
    taught = _demonstrated(task, chat, memory)
    replies = iter([tuple(segment.token_ids[segment.action_mask].tolist()) for segment in taught])

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(next(replies) if sampling.max_tokens > 8 else ())

    async def play() -> Trajectory:
        spec = EpisodeSpec(task, "g.0", temperature=1.0, max_answer_tokens=8, max_turns=9, seed=0)
        batcher, built = WriteBatcher(ScriptedWriter()), build_memory(memory, WriteConfig(), SURROUNDINGS)
        return await run_episode(spec, ENVIRONMENT, ScriptedPolicy(script), batcher, chat, built, "basis")

    played, demonstrated = (
        [segment.token_ids.tolist() for segment in segments]
        for segments in (asyncio.run(play()).segments, taught)
    )
    assert played == demonstrated


def test_it_runs_inside_a_running_event_loop_too(chat: ChatFormat) -> None:
    async def inside() -> int:
        memory = MemoryConfig(max_context_tokens=50)
        return len(_demonstrated(TASKS[0], chat, memory))

    assert asyncio.run(inside()) >= 2
