"""What happens when the context is full: TMEM's write and clear, truncation, and texts over the window."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import pytest

from actors.memory.base import Agent
from actors.memory.parametric import ParametricMemory
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import extraction_prompt
from actors.types import FastWeights, Flashcard, Generation, SpanKind, WriteExample, WriteRequest, WriteResult
from configs.schema import MemoryConfig, WriteConfig
from tests.unit import tokenizer_families
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedWriter, sampled

PAPER = WriteConfig()
WINDOW = SURROUNDINGS.window_tokens
ACCEPTED = itertools.repeat("accepted")
CARDS = '[{"instruction": "Who moved?", "output": "Nora"}, {"instruction": "Where to?", "output": "Lisbon"}]'


class _Actor:
    """An Actor that says ``texts`` in turn."""

    def __init__(
        self, chat: ChatFormat, texts: Sequence[str], outcomes: Iterator[str] = ACCEPTED, stops: bool = True
    ) -> None:
        self.version = 0
        self.weights = FastWeights("basis", 0, {})
        self.prompts: list[tuple[int, ...]] = []
        self.learned: list[tuple[WriteExample, ...]] = []
        self.cards: list[tuple[Flashcard, ...]] = []  # of the episode so far, at each write
        self._chat = chat
        self._texts = list(texts)
        self._outcomes = outcomes
        self._stops = stops

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        self.prompts.append(tuple(prompt_ids))
        text = self._texts.pop(0)
        return sampled(self._chat.reply(text)) if self._stops else sampled(self._chat.encode(text), "length")

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        self.learned.append(tuple(examples))
        self.cards.append(tuple(cards))
        request = WriteRequest("e", self.weights, tuple(examples))
        (result,) = ScriptedWriter(lambda request: next(self._outcomes)).write([request])
        self.weights = result.weights
        return request, result


def _agent(chat: ChatFormat, actor: _Actor, text: str = "Nora has moved to Lisbon.") -> Agent:
    agent = Agent(actor, chat, "Be brief.", "Where does Nora live?")
    agent.context.tell(chat.user(text))
    return agent


def _relieve(
    agent: Agent,
    write: WriteConfig = PAPER,
    question_blind: bool = False,
    wordings: Literal[1, 2] = 1,
    grounded: bool = False,
) -> None:
    config = MemoryConfig(
        max_context_tokens=10, question_blind=question_blind, wordings=wordings, grounded=grounded
    )
    asyncio.run(ParametricMemory(config, write, WINDOW).relieve(agent, 0))


def _list(cards: Sequence[tuple[str, str]]) -> str:
    return json.dumps([{"instruction": question, "output": answer} for question, answer in cards])


def test_flashcards_are_written_and_the_context_cleared(chat: ChatFormat) -> None:
    actor = _Actor(chat, [CARDS])
    agent = _agent(chat, actor)
    read = agent.context.ids
    _relieve(agent)
    (segment,) = agent.segments
    (record,) = agent.writes
    assert actor.prompts[0][: len(read)] == read  # the context stands in front of the memory-writing prompt
    assert "Where does Nora live?" in chat.decode(actor.prompts[0][len(read) :])
    assert segment.token_ids[segment.action_mask].tolist() == list(chat.reply(CARDS))
    assert segment.revision == 0 and segment.spans[0].kind == "extract"  # sampled before the write
    assert agent.context.ids == chat.system("Be brief.")
    assert record.outcome == "accepted" and record.revision == 1 and record.extraction == CARDS
    assert record.flashcards == (Flashcard("Who moved?", "Nora"), Flashcard("Where to?", "Lisbon"))
    assert record.examples == actor.learned[0]
    assert record.prompt_tokens == sum(len(example.prompt_ids) for example in record.examples)
    assert record.answer_tokens == sum(len(example.answer_ids) for example in record.examples)


def test_writes_accumulate_and_the_next_prompt_shows_what_is_saved(chat: ChatFormat) -> None:
    actor = _Actor(chat, [CARDS, '[{"instruction": "What rained?", "output": "cats"}]'])
    agent = _agent(chat, actor)
    _relieve(agent)
    agent.context.tell(chat.user("It rained cats."))
    _relieve(agent)
    assert "Who moved? Nora Where to? Lisbon" in chat.decode(actor.prompts[1])
    assert [record.revision for record in agent.writes] == [1, 2]
    assert [segment.revision for segment in agent.segments] == [0, 1]


def test_a_write_names_the_cards_of_the_episode_so_far_but_not_those_rolled_back(chat: ChatFormat) -> None:
    """They are the log's, so those of a loaded conversation count too."""
    texts = [CARDS, *(f'[{{"instruction": "What rained {n}?", "output": "cats"}}]' for n in range(2))]
    actor = _Actor(chat, texts, iter(["accepted", "rolled_back", "accepted"]))
    agent = _agent(chat, actor)
    for _ in texts:
        _relieve(agent)
        agent.context.tell(chat.user("It rained cats."))
    asked = [[card.question for card in cards] for cards in actor.cards]
    first = ["Who moved?", "Where to?"]
    assert asked == [first, [*first, "What rained 0?"], [*first, "What rained 1?"]]


def test_rehearsal_trains_earlier_cards_again_but_not_outdated_ones(chat: ChatFormat) -> None:
    moved = '[{"instruction": "Where to?", "output": "Oslo"}]'
    # one of the two earlier cards is outdated: "Where to?" is answered anew
    for rehearsal, cards in ((0, 1), (1, 2), (8, 2)):
        actor = _Actor(chat, [CARDS, moved])
        agent = _agent(chat, actor)
        write = WriteConfig(rehearsal=rehearsal)
        _relieve(agent, write)
        agent.context.tell(chat.user("Then she went on to Oslo."))
        _relieve(agent, write)
        assert len(actor.learned[1]) == cards
        assert actor.learned[1][0].answer_ids == chat.reply("Oslo")
        if rehearsal:
            assert actor.learned[1][1].answer_ids == chat.reply("Nora")
        # the log holds the new cards only
        assert agent.writes[1].flashcards == (Flashcard("Where to?", "Oslo"),)


def test_rehearsal_takes_the_newest_earlier_cards(chat: ChatFormat) -> None:
    """A card that was answered anew counts as new. A write that was rolled back left no card."""
    outcomes = iter(["accepted", "accepted", "accepted", "rolled_back", "accepted"])
    cards = [("a", "old"), ("b", "two"), ("a", "new"), ("c", "lost"), ("d", "now")]
    actor = _Actor(
        chat, [json.dumps([{"instruction": q, "output": answer}]) for q, answer in cards], outcomes
    )
    agent = _agent(chat, actor)
    for _ in cards:
        agent.context.tell(chat.user("More."))
        _relieve(agent, WriteConfig(rehearsal=1))
    rehearsed = [[chat.decode(example.answer_ids) for example in examples[1:]] for examples in actor.learned]
    wanted = [[], ["old"], ["two"], ["new"], ["new"]]
    assert rehearsed == [[chat.decode(chat.reply(answer)) for answer in answers] for answers in wanted]


def test_cards_are_learnt_at_every_depth_the_rehearsed_ones_too(chat: ChatFormat) -> None:
    actor = _Actor(chat, [CARDS, '[{"instruction": "What rained?", "output": "cats"}]'])
    agent = _agent(chat, actor)
    write = WriteConfig(rehearsal=1, depths=(1, 2))
    _relieve(agent, write)
    agent.context.tell(chat.user("It rained cats."))
    _relieve(agent, write)
    answers = [[chat.decode(example.answer_ids) for example in examples] for examples in actor.learned]
    new, earlier = chat.decode(chat.reply("cats")), chat.decode(chat.reply("Lisbon"))
    # of the first two cards each has one other; then there are two, and one of them is rehearsed
    assert len(answers[0]) == 4
    assert answers[1] == [new, earlier, new, new, earlier, earlier]
    assert "Nora" in chat.decode(actor.learned[1][3].prompt_ids)  # a card that is not rehearsed is an other
    assert agent.writes[1].flashcards == (Flashcard("What rained?", "cats"),)


def test_with_two_wordings_a_new_answer_outdates_both_old_questions(chat: ChatFormat) -> None:
    home = [("Where to?", "Lisbon"), ("Which city?", "Lisbon"), ("Who?", "Nora"), ("Whose move?", "Nora")]
    moved = [("Where to?", "Oslo"), ("What place?", "Oslo")]
    actor = _Actor(chat, [_list(home), _list(moved)])
    agent = _agent(chat, actor)
    write = WriteConfig(rehearsal=8)
    _relieve(agent, write, wordings=2)
    assert "in different words" in chat.decode(actor.prompts[0])
    agent.context.tell(chat.user("Then she went on to Oslo."))
    _relieve(agent, write, wordings=2)
    learned = [chat.decode(example.answer_ids) for example in actor.learned[1]]
    assert learned == [chat.decode(chat.reply(text)) for text in ("Oslo", "Oslo", "Nora", "Nora")]
    same = _list([("Where to?", "Oslo")])  # told again: no answer changed, and the other wording stays
    actor._texts.append(same)
    agent.context.tell(chat.user("She is in Oslo."))
    _relieve(agent, write, wordings=2)
    assert "What place?" in chat.decode(actor.learned[2][3].prompt_ids)


def test_grounded_cards_answer_with_words_that_were_told(chat: ChatFormat) -> None:
    """Neither what the agent said itself nor what was saved before counts as told."""
    cards = [("Where does Nora live?", "LISBON."), ("Who moved?", "Nora Lisbon"), ("Which pet?", "a parrot")]
    actor = _Actor(chat, ["A parrot.", _list(cards), _list(cards[:1])])
    agent = _agent(chat, actor)
    asyncio.run(agent.reply("act", 8))
    _relieve(agent, grounded=True)
    agent.context.tell(chat.user("Omar left."))
    _relieve(agent, grounded=True)
    first, second = agent.writes
    assert [card.answer for card in first.flashcards] == ["LISBON.", "Nora Lisbon"]
    assert first.rejected_flashcards == 1
    assert (second.outcome, second.flashcards, second.rejected_flashcards) == ("empty", (), 1)
    assert "nobody told (memory.grounded)" in second.reason
    freely = _agent(chat, _Actor(chat, [_list(cards)]))
    _relieve(freely)
    assert len(freely.writes[0].flashcards) == 3


def test_a_grounded_answer_may_stand_within_a_text_without_blanks(chat: ChatFormat) -> None:
    """In Latin letters "art" is not told by "start"."""
    cards = [("她住在哪里?", "上海"), ("她养什么?", "猫"), ("What begins?", "art")]
    agent = _agent(chat, _Actor(chat, [_list(cards)]), "她住在上海。 They start.")
    _relieve(agent, grounded=True)
    assert [card.answer for card in agent.writes[0].flashcards] == ["上海"]


def test_question_blind_leaves_the_question_out(chat: ChatFormat) -> None:
    actor = _Actor(chat, [CARDS])
    _relieve(_agent(chat, actor), question_blind=True)
    assert "Where does Nora live?" not in chat.decode(actor.prompts[0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I am sorry.", "no JSON array"),
        ("[]", "is empty"),
        ("", "no JSON array"),
        ('[{"instruction": ""}]', "none of the array's 1"),
    ],
)
def test_a_failed_extraction_is_an_empty_recorded_write(chat: ChatFormat, text: str, reason: str) -> None:
    actor = _Actor(chat, [text])
    agent = _agent(chat, actor)
    _relieve(agent)
    (record,) = agent.writes
    assert (record.outcome, record.revision, record.flashcards, record.extraction) == ("empty", 0, (), text)
    assert reason in record.reason and math.isnan(record.loss_before)
    assert actor.learned == [] and actor.weights.revision == 0
    # the failed extraction is still an action to learn from
    assert agent.context.is_fresh and len(agent.segments) == 1


def test_an_extraction_cut_by_length_keeps_its_complete_cards(chat: ChatFormat) -> None:
    actor = _Actor(chat, [CARDS[:60]], stops=False)
    agent = _agent(chat, actor)
    _relieve(agent)
    assert agent.writes[0].flashcards == (Flashcard("Who moved?", "Nora"),)
    (segment,) = agent.segments
    # the stop token that closes it was not sampled
    assert segment.action_mask.sum() == len(chat.encode(CARDS[:60]))


def test_a_rolled_back_write_is_recorded_and_not_shown_as_saved(chat: ChatFormat) -> None:
    actor = _Actor(chat, [CARDS, "[]"], iter(["rolled_back"]))
    agent = _agent(chat, actor)
    _relieve(agent)
    agent.context.tell(chat.user("More."))
    _relieve(agent)
    record = agent.writes[0]
    assert (record.outcome, record.revision) == ("rolled_back", 0)
    assert record.reason == "the loss rose from 2.0 to 9.0"
    assert "Who moved?" not in chat.decode(actor.prompts[1])


def test_cards_over_the_limits_are_rejected_and_counted(chat: ChatFormat) -> None:
    long = json.dumps(
        [{"instruction": "What?", "output": "word " * 100}, {"instruction": "Who?", "output": "Nora"}]
    )
    agent = _agent(chat, _Actor(chat, [long]))
    _relieve(agent, WriteConfig(max_example_tokens=60))
    assert agent.writes[0].flashcards == (Flashcard("Who?", "Nora"),)
    assert agent.writes[0].rejected_flashcards == 1
    agent = _agent(chat, _Actor(chat, [CARDS]))
    _relieve(agent, WriteConfig(max_example_tokens=5))
    assert (agent.writes[0].outcome, agent.writes[0].rejected_flashcards) == ("empty", 2)
    assert "write.max_example_tokens=5" in agent.writes[0].reason


def test_repaired_cards_are_written_and_counted(chat: ChatFormat) -> None:
    agent = _agent(chat, _Actor(chat, ["[{'q': 'Who?', 'a': 'Nora'}, {'q': 'Where?', 'a': 'Lisbon'}]"]))
    _relieve(agent)
    (record,) = agent.writes
    assert record.flashcards == (Flashcard("Who?", "Nora"), Flashcard("Where?", "Lisbon"))
    assert (record.repaired_flashcards, record.rejected_flashcards) == (2, 0)


def test_what_a_model_only_thinks_is_neither_written_nor_answered() -> None:
    """A model whose prompt opens the thought, as R1's distills have it."""
    thinking = ChatFormat(tokenizer_families.byte_level(tokenizer_families.R1))
    reply = f'A draft: [{{"q": "Who?", "a": "Omar"}}]. Better:\n</think>\n\n{CARDS}'
    answer = "Oslo? No.</think>\n\nLisbon"
    actor = _Actor(thinking, [reply, answer])
    agent = _agent(thinking, actor)
    _relieve(agent)
    (record,) = agent.writes
    assert record.extraction == CARDS and record.repaired_flashcards == 0
    assert "Omar" not in {card.answer for card in record.flashcards}
    for example in actor.learned[0]:
        assert thinking.decode(example.prompt_ids).endswith("<think>\n")
        assert thinking.decode(example.answer_ids).startswith("\n</think>\n\n")
    assert asyncio.run(agent.reply("act", 8)) == "Lisbon"
    cut = _Actor(thinking, [reply.partition("</think>")[0]], stops=False)
    agent = _agent(thinking, cut)
    _relieve(agent)
    assert agent.writes[0].extraction == "" and agent.writes[0].outcome == "empty"


def test_the_saved_cards_shown_are_bounded_newest_first(chat: ChatFormat) -> None:
    extractions = [
        json.dumps([{"instruction": f"Question number {i}?", "output": f"answer {i}"}]) for i in range(8)
    ]
    actor = _Actor(chat, extractions)
    agent = _agent(chat, actor)
    memory = ParametricMemory(
        MemoryConfig(max_context_tokens=10, max_extract_tokens=32), WriteConfig(), WINDOW
    )
    for _ in range(8):
        agent.context.tell(chat.user("More."))
        asyncio.run(memory.relieve(agent, 0))
    last = chat.decode(actor.prompts[-1])
    assert "Question number 6?" in last and "Question number 0?" not in last


def test_a_context_is_relieved_before_a_turn_that_leaves_no_room_for_an_extraction(chat: ChatFormat) -> None:
    """Without it the engine would refuse the memory-writing prompt, or cut the flashcards short."""
    text = "Nora has moved to Lisbon. " * 6
    turn = len(chat.user(text))
    config = MemoryConfig(max_context_tokens=turn + 20, max_extract_tokens=32)
    for room, extractions in ((2 * turn, [2]), (2 * turn - 1, [1, 1])):
        actor = _Actor(chat, [CARDS, CARDS])
        agent = Agent(actor, chat, "Be brief.", "Where does Nora live?")
        prompt = chat.user(extraction_prompt(agent.question, ())) + chat.assistant_open
        window = len(agent.context) + room + len(prompt) + 32
        memory = ParametricMemory(config, WriteConfig(), window)
        for _ in range(2):
            asyncio.run(memory.read(agent, text))
        if not agent.context.is_fresh:
            asyncio.run(memory.relieve(agent, 0))
        told = [chat.decode(ids).count("Lisbon. Nora") // 5 for ids in actor.prompts]
        assert told == extractions
        assert all(len(ids) + 32 <= window for ids in actor.prompts)


def test_a_long_text_waits_for_an_empty_context_rather_than_come_in_pieces(chat: ChatFormat) -> None:
    text = "Nora has moved to Lisbon. " * 12
    turn = len(chat.user(text))
    config = MemoryConfig(max_context_tokens=turn // 2, max_extract_tokens=32)
    actor = _Actor(chat, [CARDS, CARDS])
    agent = _agent(chat, actor, "Omar works as a baker. " * 8)
    window = len(chat.system("Be brief.")) + turn + len(chat.user(extraction_prompt(agent.question, ()))) + 60
    asyncio.run(ParametricMemory(config, WriteConfig(), window).read(agent, text))
    first, second = map(chat.decode, actor.prompts)
    assert "baker" in first and "Lisbon" not in first and text.strip() in second
    assert agent.context.is_fresh and len(agent.writes) == 2


def test_a_turn_to_answer_leaves_room_for_its_extraction_or_comes_in_pieces(chat: ChatFormat) -> None:
    text = "Nora has moved to Lisbon. " * 12
    config = MemoryConfig(max_context_tokens=len(chat.user(text)) // 2, max_extract_tokens=32)
    for spare, in_pieces in ((0, False), (-1, True)):
        actor = _Actor(chat, [CARDS] * 6)
        agent = Agent(actor, chat, "Be brief.", "Where does Nora live?")
        asked = chat.user(extraction_prompt(agent.question, ())) + chat.assistant_open
        held = len(agent.context) + len(chat.user(text)) + len(chat.assistant_open) + 8
        window = held + len(chat.assistant_close(())) + len(asked) + 32 + spare
        asyncio.run(ParametricMemory(config, WriteConfig(), window).answer(agent, text, 8))
        assert (len(agent.writes) > 0) == in_pieces


def test_a_context_with_questions_alone_is_cleared_and_counted(chat: ChatFormat) -> None:
    agent = Agent(_Actor(chat, ["Lisbon"]), chat, "Be brief.", "")
    memory = ParametricMemory(MemoryConfig(max_context_tokens=10), PAPER, WINDOW)
    agent.turn_tells = False
    asyncio.run(memory.answer(agent, "Where does Nora live?", 8))
    asyncio.run(memory.relieve(agent, 0))
    assert agent.context.is_fresh and agent.writes == [] and len(agent.segments) == 1
    assert memory.events == {"cleared_without_news": 1}
