"""Controls of the write: which cards an episode writes in place of the agent's, and what its log says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from actors.environments.recall import RecallEnvironment
from actors.episodes.controls import require_control, write_control
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.memory.base import Agent
from actors.memory.build import build_memory
from actors.memory.controls import GoldCards
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import parse_flashcards
from actors.types import AdapterKey, FailedEpisode, Flashcard, Generation, Sampling, Trajectory
from configs.load import ConfigError, load_config
from configs.schema import MemoryConfig, RecallConfig, RolloutConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

OTHERS = ("Where does Zoe live?", "What pet does Abe have?", "When is Kim's birthday?")
FIRST = '[{"instruction": "Who moved?", "output": "Nora"}, {"instruction": "Where to?", "output": "Lisbon"}]'
SECOND = '[{"instruction": "Who moved?", "output": "Nora"}, {"instruction": "What for?", "output": "work"}]'

REHEARSING = WriteConfig(rehearsal=8)


class Asking(RecallEnvironment):
    """Recall with a fixed list of other questions."""

    others: tuple[str, ...] = OTHERS

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        return self.others[:count]

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        return ()


ENVIRONMENT = Asking(RecallConfig(sessions=2, facts_per_session=4, questions=2, filler_sentences=1))
TASK = next(ENVIRONMENT.tasks("eval", 0, 0))


def policy_of(chat: ChatFormat) -> ScriptedPolicy:
    """Extracts FIRST, then SECOND, then nothing."""
    texts = itertools.chain((FIRST, SECOND), itertools.repeat("[]"))

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply(next(texts) if sampling.kind == "extract" else "Lisbon"))

    return ScriptedPolicy(script)


def play(
    chat: ChatFormat,
    control: str,
    environment: RecallEnvironment = ENVIRONMENT,
    write: WriteConfig = REHEARSING,
    blind: bool = False,
    wordings: Literal[1, 2] = 1,
) -> tuple[Trajectory | FailedEpisode, ScriptedPolicy, ScriptedWriter]:
    memory = MemoryConfig(
        max_context_tokens=50,
        control=control,  # type: ignore[arg-type]
        question_blind=blind,
        wordings=wordings,
    )
    policy, writer = policy_of(chat), ScriptedWriter()
    rollout = Rollout(
        policy, writer, environment, chat, write, RolloutConfig(), 4, SURROUNDINGS, "basis", "worker-0"
    )
    request = RolloutRequest(TASK, "g", 1, memory, temperature=0.0, max_answer_tokens=8, seed=1)
    group = asyncio.run(rollout.group(request))
    episodes: list[Trajectory | FailedEpisode] = [*group.trajectories, *group.failed]
    (episode,) = episodes
    return episode, policy, writer


def played(chat: ChatFormat, control: str) -> tuple[Trajectory, ScriptedPolicy, ScriptedWriter]:
    episode, policy, writer = play(chat, control)
    assert isinstance(episode, Trajectory)
    return episode, policy, writer


def extraction_prompts(policy: ScriptedPolicy) -> list[tuple[int, ...]]:
    return [prompt for prompt, sampling, _ in policy.calls if sampling.kind == "extract"]


def test_the_oracle_writes_the_gold_cards_of_each_told_session(chat: ChatFormat) -> None:
    episode, policy, _ = played(chat, "oracle")
    gold = [ENVIRONMENT.demonstrate_flashcards(TASK, text, False) for text in TASK.payload["sessions"]]
    assert [record.flashcards for record in episode.writes[:2]] == gold
    assert sum(map(len, gold)) == 2  # all that will be asked
    assert extraction_prompts(policy) == []  # nothing of them is sampled


def test_gold_tokens_are_no_actions_so_nothing_can_train_on_them(chat: ChatFormat) -> None:
    for control in ("oracle", "oracle_other_cards"):
        episode, _, _ = played(chat, control)
        assert {span.kind for segment in episode.segments for span in segment.spans} == {"act"}


def test_gold_cards_stand_in_the_context_as_a_reply(chat: ChatFormat) -> None:
    """What follows reads a conversation of the model's own form."""
    agent = Agent(None, chat, "Be brief.", "")  # type: ignore[arg-type]
    agent.context.observe(chat.user("Nora has moved to Lisbon."))
    before, cards = agent.context.ids, (Flashcard("Where does Nora live?", "Lisbon"),)
    text = asyncio.run(GoldCards(lambda _: cards).extract(agent, 8))
    turns = [(turn.role, turn.text) for turn in chat.turns(agent.context.ids)]
    assert turns[-1] == ("assistant", text) and parse_flashcards(text, 8).cards == cards
    reply = chat.reply(text)
    assert agent.context.ids == before + chat.assistant_open + reply + chat.assistant_close(reply)


def test_a_question_blind_oracle_writes_all_that_was_told(chat: ChatFormat) -> None:
    episode, _, _ = play(chat, "oracle", blind=True)
    assert isinstance(episode, Trajectory)
    gold = [ENVIRONMENT.demonstrate_flashcards(TASK, text, True) for text in TASK.payload["sessions"]]
    assert [record.flashcards for record in episode.writes[:2]] == gold
    assert sum(map(len, gold)) == 8


def test_the_oracle_writes_as_many_wordings_as_the_agent_is_asked_for(chat: ChatFormat) -> None:
    episode, _, _ = play(chat, "oracle", wordings=2)
    assert isinstance(episode, Trajectory)
    cards = [card for record in episode.writes for card in record.flashcards]
    assert len(cards) == 4 and len({card.answer for card in cards}) == 2


def test_other_cards_have_the_agents_answers_under_other_questions(chat: ChatFormat) -> None:
    own, own_policy, _ = played(chat, "none")
    other, policy, writer = played(chat, "other_cards")
    assert [record.extraction for record in other.writes] == [record.extraction for record in own.writes]
    assert [record.flashcards for record in other.writes[:2]] == [
        (Flashcard(OTHERS[0], "Nora"), Flashcard(OTHERS[1], "Lisbon")),
        (Flashcard(OTHERS[0], "Nora"), Flashcard(OTHERS[2], "work")),  # one card again, and a new one
    ]
    trained = [
        chat.decode(example.prompt_ids) for (request,) in writer.batches for example in request.examples
    ]
    assert len(trained) == 5  # the second write rehearses the second card
    assert all(any(question in prompt for question in OTHERS) for prompt in trained)
    assert not any("Who moved?" in prompt or "Where to?" in prompt for prompt in trained)
    # the agent is shown its own cards as saved: its extractions are those of the row tmem
    assert extraction_prompts(policy) == extraction_prompts(own_policy)


def test_gold_answers_under_other_questions(chat: ChatFormat) -> None:
    gold, _, _ = played(chat, "oracle")
    other, _, _ = played(chat, "oracle_other_cards")
    answers = [[card.answer for card in record.flashcards] for record in gold.writes]
    assert [[card.answer for card in record.flashcards] for record in other.writes] == answers
    assert {card.question for record in other.writes for card in record.flashcards} == set(OTHERS[:2])


def test_every_control_counts_as_many_cards_as_were_extracted(chat: ChatFormat) -> None:
    """A card over ``write.max_example_tokens`` is rejected in the control as it is in the memory."""
    episode, _, _ = play(chat, "other_cards", write=WriteConfig(max_example_tokens=8))
    assert isinstance(episode, Trajectory)
    assert [record.rejected_flashcards for record in episode.writes[:2]] == [2, 2]


def test_questions_that_run_out_come_again(chat: ChatFormat) -> None:
    control = write_control(MemoryConfig(control="other_cards"), TASK, ENVIRONMENT)
    cards = [Flashcard(f"Question {number}?", str(number)) for number in range(5)]
    assert [card.question for card in control.written(cards)] == [*OTHERS, *OTHERS[:2]]


def test_an_environment_without_another_question_fails_its_episode(chat: ChatFormat) -> None:
    class Silent(Asking):
        others = ()

    episode, _, _ = play(chat, "other_cards", Silent(RecallConfig()))
    assert isinstance(episode, FailedEpisode) and episode.boundary == "environment"
    assert "gave no question about others" in episode.message


# --- what is refused --------------------------------------------------------------------------------------


class Plain:
    name = "plain"


@pytest.mark.parametrize(
    ("control", "missing"),
    [
        ("oracle", "gold flashcards"),
        ("other_cards", "questions about others"),
        ("oracle_other_cards", "gold"),
    ],
)
def test_an_environment_that_lacks_a_part_is_refused_in_one_line(control: str, missing: str) -> None:
    memory = MemoryConfig(control=control)  # type: ignore[arg-type]
    with pytest.raises(
        TaskError, match=rf"^memory\.control={control} .* plain has no {missing}.*; leave"
    ) as error:
        require_control(memory, Plain())  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    require_control(memory, ENVIRONMENT)
    require_control(MemoryConfig(), Plain())  # type: ignore[arg-type]


def test_only_a_memory_of_flashcards_has_controls() -> None:
    with pytest.raises(
        ConfigError, match=r"memory\.control='oracle' .*memory\.policy is none of parametric, hybrid"
    ):
        load_config(Path("tests/quickstart.yaml"), ["memory.policy=summary", "memory.control=oracle"])
    load_config(Path("tests/quickstart.yaml"), ["memory.policy=hybrid", "memory.control=oracle"])


def test_the_hybrid_memory_has_the_control_too(chat: ChatFormat) -> None:
    config = MemoryConfig(policy="hybrid", max_context_tokens=2000, control="oracle")
    control = write_control(config, TASK, ENVIRONMENT)
    memory = build_memory(config, WriteConfig(), SURROUNDINGS, control)
    assert memory._flashcards._control is control  # type: ignore[attr-defined]
