"""The pool of preserved replies: what is asked, in which order, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from actors.episodes.preservation import Preservation, PromptMaker, in_turn, shipped_questions
from actors.protocols import EngineError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Flashcard, Generation, Sampling, WriteExample
from configs.schema import PreserveConfig
from tests.unit.rollout_fakes import ScriptedPolicy

CONFIG = PreserveConfig(
    weight=1.0, questions=4, extractions=1, everyday=1, per_step=3, reply_tokens=2, extraction_tokens=5
)
NORA, OMAR = Flashcard("Where does Nora live?", "Lisbon"), Flashcard("Where does Omar live?", "Oslo")


class Words:
    """A Questioner with three questions, and one beside each card."""

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        return tuple(f"Question {seed} {number}?" for number in range(min(3, count)))

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        name = card.question.split()[2]
        return tuple(f"What is {name}'s {thing}?" for thing in ("pet", "job")) if name != "Omar" else ()


def policy_of(chat: ChatFormat) -> ScriptedPolicy:
    def script(prompt: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        assert sampling.temperature == 0 and adapter.revision == 0, "the policy's own, without Delta"
        ids = chat.encode("I do not know this one at all")[: sampling.max_tokens]
        return Generation(tuple(ids), (0.0,) * len(ids), "length")

    return ScriptedPolicy(script)


def pool_of(policy: ScriptedPolicy, chat: ChatFormat, config: PreserveConfig = CONFIG) -> Preservation:
    return Preservation(policy, PromptMaker(chat, "Be brief.", Words(), config), config, 7)


def asked(chat: ChatFormat, replies: Sequence[WriteExample]) -> list[str]:
    """The last user turn of each prompt, a word of it."""
    return [chat.decode(reply.prompt_ids) for reply in replies]


def test_the_pool_has_the_environments_questions_then_shipped_ones_and_passages(chat: ChatFormat) -> None:
    policy = policy_of(chat)
    replies = asyncio.run(pool_of(policy, chat).replies([]))
    texts = asked(chat, replies)
    assert sum("Question 7" in text for text in texts) == 3
    assert sum(shipped_questions(1)[0] in text for text in texts) == 1
    passages = {
        reply for reply, text in zip(replies, texts, strict=True) if "JSON" in text or "boil an egg" in text
    }
    assert [len(reply.answer_ids) for reply in passages] == [5, 5]
    assert {len(reply.answer_ids) for reply in replies if reply not in passages} == {2}
    assert len(replies) % CONFIG.per_step == 0 and len(set(replies)) == 6


def test_half_of_a_step_is_beside_the_cards_where_the_environment_knows_some(chat: ChatFormat) -> None:
    pool = pool_of(policy_of(chat), chat)
    texts = asked(chat, asyncio.run(pool.replies([NORA, OMAR])))
    steps = [texts[start : start + 3] for start in range(0, len(texts), 3)]
    assert all(sum("Nora's pet" in text for text in step) == 1 for step in steps)
    assert not any("Nora's job" in text for text in texts), "write.preserve.beside is 1"
    wide = pool_of(policy_of(chat), chat, replace(CONFIG, beside=2))
    assert any("Nora's job" in text for text in asked(chat, asyncio.run(wide.replies([NORA]))))


def test_without_a_questioner_the_cards_are_asked_of_other_people(chat: ChatFormat) -> None:
    """A conversation has none. A question without a name has no other."""
    maker = PromptMaker(chat, "Be brief.", None, replace(CONFIG, beside=2))
    cards = [Flashcard("When was Nora's cat born?", "May 3"), Flashcard("Who is Olaf Lund?", "a welder")]
    texts = [chat.decode(prompt.ids) for prompt in maker.beside([*cards, Flashcard("What rained?", "cats")])]
    assert len(set(texts)) == len(texts) == 4
    assert all("When was " in text and "'s cat born?" in text and "Nora" not in text for text in texts[:2])
    assert all("Who is " in text and "Olaf" not in text and "Lund" not in text for text in texts[2:])


def test_each_reply_is_made_once_a_version(chat: ChatFormat) -> None:
    policy = policy_of(chat)
    pool = pool_of(policy, chat)

    async def episodes() -> None:
        await asyncio.gather(*(pool.replies([NORA]) for _ in range(4)))
        await pool.replies([OMAR])

    asyncio.run(episodes())
    assert len(policy.calls) == 7  # 4 questions, an extraction, an everyday request, one beside Nora
    policy.version += 1
    asyncio.run(pool.replies([NORA]))
    assert len(policy.calls) == 14


def test_an_episode_that_gives_up_takes_no_reply_from_the_others(chat: ChatFormat) -> None:
    policy = ScriptedPolicy(
        lambda prompt, sampling, adapter: Generation((1, 2), (0.0, 0.0), "length"), delay_s=0.05
    )
    pool = pool_of(policy, chat)

    async def episodes() -> tuple[WriteExample, ...]:
        leaves, stays = asyncio.create_task(pool.replies([])), asyncio.create_task(pool.replies([]))
        await asyncio.sleep(0.01)
        leaves.cancel()
        return await stays

    assert len(set(asyncio.run(episodes()))) == 6


def test_a_dead_engine_is_an_error_of_the_episode_and_is_asked_again(chat: ChatFormat) -> None:
    dead = True

    def script(prompt: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        if dead:
            raise EngineError("the engine is dead")
        return Generation((1, 2), (0.0, 0.0), "length")

    pool = pool_of(ScriptedPolicy(script), chat)
    with pytest.raises(EngineError, match="dead"):
        asyncio.run(pool.replies([]))
    dead = False
    assert asyncio.run(pool.replies([]))


def test_what_a_card_answers_is_not_preserved(chat: ChatFormat) -> None:
    """The pool is drawn without a look at the episode: it may hold the card's own question."""
    pool = pool_of(policy_of(chat), chat)
    shipped = shipped_questions(1)[0]
    assert any(shipped in text for text in asked(chat, asyncio.run(pool.replies([NORA]))))
    card = Flashcard(shipped, "Utrecht")
    assert not any(shipped in text for text in asked(chat, asyncio.run(pool.replies([NORA, card]))))


def test_off_asks_nothing(chat: ChatFormat) -> None:
    policy = policy_of(chat)
    assert asyncio.run(pool_of(policy, chat, PreserveConfig()).replies([NORA])) == ()
    assert policy.calls == []


def test_every_reply_of_the_pool_comes_in_turn() -> None:
    pool = [WriteExample((number,), (1,)) for number in range(5)]
    beside = [WriteExample((10 + number,), (1,)) for number in range(3)]
    order = in_turn(pool, beside, 4)
    assert set(order) == {*pool, *beside}
    own = [order[start : start + 2] for start in range(0, len(order), 4)]
    assert own == [(beside[0], beside[1]), (beside[2], beside[0]), (beside[1], beside[2])]
    assert in_turn(pool, [], 2) == (*pool, pool[0])
    assert in_turn(pool, beside, 1) == tuple(pool), "one a step leaves no room beside"
    assert in_turn([], beside, 4) == tuple(beside)
