"""Recall tasks: reproducible, answerable, never shared between training and evaluation."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from actors.environments.build import build_environment
from actors.environments.recall import RecallEnvironment, vocabulary
from actors.environments.recall_questions import subject_of
from actors.environments.recall_words import FILLERS, PEOPLE, RELATIONS
from actors.protocols import TaskError
from actors.types import Flashcard, Task
from cluster.probe.cards import PARAPHRASES
from configs.bounds import BoundError
from configs.environments import RECALL_RELATIONS
from configs.schema import EmbedderConfig, EnvironmentConfig, RecallConfig

ENVIRONMENT = RecallEnvironment(
    RecallConfig(sessions=3, facts_per_session=2, questions=4, filler_sentences=1)
)


def _tasks(split: str, count: int, seed: int = 0, start: int = 0) -> list[Task]:
    assert split in ("train", "eval")
    return list(
        itertools.islice(ENVIRONMENT.tasks("train" if split == "train" else "eval", seed, start), count)
    )


def test_position_and_seed_alone_determine_a_task() -> None:
    assert _tasks("train", 5, start=7) == _tasks("train", 12)[7:]
    assert (
        RecallEnvironment(RecallConfig(3, 2, 4, 1)).tasks("eval", 5, 3).__next__()
        == _tasks("eval", 1, seed=5, start=3)[0]
    )
    assert _tasks("train", 3, seed=1) != _tasks("train", 3, seed=2)
    assert len({task.id for task in _tasks("train", 50)}) == 50


def test_questions_are_spread_over_the_sessions() -> None:
    for task in _tasks("train", 40):
        asked = {question["question"] for question in task.payload["questions"]}
        facts = [fact["question"] in asked for fact in task.payload["facts"]]
        per_session = [sum(facts[place : place + 2]) for place in range(0, 6, 2)]
        assert sum(per_session) == 4 and min(per_session) >= 1  # four questions, three sessions


def test_relations_name_all_that_is_told_asked_and_drawn_by_lot() -> None:
    config = RecallConfig(1, 2, 2, 1, relations=("pet", "home"), unknown_questions=2)
    few = RecallEnvironment(config)
    told, asked = set(), set()
    for task in itertools.islice(few.tasks("eval", 0, 0), 40):
        told |= {fact["relation"] for fact in task.payload["facts"]}
        asked |= {question["relation"] for question in task.payload["questions"]}
    assert told == asked == {"pet", "home"}
    others = {subject.relation.name for text in few.other_questions(60, 0) if (subject := subject_of(text))}
    assert others == {"pet", "home"}
    beside = map(subject_of, few.questions_beside(Flashcard("What pet does Nora have?", "dog"), ()))
    assert [subject.relation.name for subject in beside if subject] == ["home"]
    assert tuple(relation.name for relation in RELATIONS) == RECALL_RELATIONS


@pytest.mark.parametrize("names", [("pets", "home"), ("pet",), ("pet", "pet")])
def test_relations_are_two_or_more_of_the_known_ones(names: tuple[str, ...]) -> None:
    with pytest.raises(BoundError, match=r"relations.* must be two or more of home, job, .*, or none"):
        RecallConfig(relations=names)


def test_a_task_is_the_same_in_another_process() -> None:
    """Python's own hashing differs by process; a task must not. A change of the word lists changes this."""
    (task,) = _tasks("train", 1)
    assert task.payload["questions"][0] == PINNED_QUESTION
    assert json.loads(json.dumps(task.payload)) == task.payload


PINNED_QUESTION = {"question": "What does Thomas do for a living?", "answer": "judge", "relation": "job"}


def test_train_and_eval_share_no_person_and_no_answer() -> None:
    assert not set(PEOPLE["train"]) & set(PEOPLE["eval"])
    for relation in RELATIONS:
        assert not set(relation.values["train"]) & set(relation.values["eval"]), relation.name
        assert all(1 <= len(value.split()) <= 3 for values in relation.values.values() for value in values)
    eval_text = " ".join(sentence for task in _tasks("eval", 200) for sentence in task.payload["sessions"])
    assert not set(PEOPLE["train"]) & set(re.findall(r"\w+", eval_text))


def test_the_wide_words_are_new_and_none_is_held_out() -> None:
    small, wide, held_out = (
        vocabulary("train", wide=False),
        vocabulary("train", wide=True),
        vocabulary("eval", wide=False),
    )
    assert len(set(wide.people)) == len(wide.people) > 3 * len(small.people)
    assert not set(wide.people) & set(held_out.people)
    answers = {
        word.lower() for values in held_out.values.values() for value in values for word in value.split()
    }
    for relation, values in wide.values.items():
        assert len(set(values)) == len(values) > len(small.values[relation]), relation
        assert (
            not {word.lower() for value in values[len(small.values[relation]) :] for word in value.split()}
            & answers
        ), relation
        assert all(1 <= len(value.split()) <= 3 for value in values), relation


def test_a_wide_vocabulary_changes_training_tasks_only() -> None:
    small, wide = (RecallEnvironment(RecallConfig(vocabulary=name)) for name in ("small", "wide"))
    assert next(small.tasks("eval", 0, 0)) == next(wide.tasks("eval", 0, 0))
    told = {
        fact["answer"]
        for task in itertools.islice(wide.tasks("train", 0, 0), 300)
        for fact in task.payload["facts"]
    }
    assert len(told) > 500


def test_questions_are_asked_otherwise_than_told() -> None:
    for relation in RELATIONS:
        wordings = (*relation.questions, relation.unwritten_question)
        assert len({*wordings, *PARAPHRASES[relation.name]}) == 5, relation.name
        told = [
            telling.replace("{name}", "").replace("{value}", "").strip(" .") for telling in relation.tellings
        ]
        assert not any(phrase and phrase in question for phrase in told for question in wordings), (
            relation.name
        )
        assert all("{value}" not in question and "{name}" in question for question in wordings)


def test_no_two_facts_of_a_task_share_an_answer() -> None:
    for task in _tasks("train", 100):
        answers = [fact["answer"] for fact in task.payload["facts"]]
        assert len(set(answers)) == len(answers)


def test_every_answer_was_told_before_it_is_asked() -> None:
    for task in _tasks("train", 100):
        session = ENVIRONMENT.start(task)
        told = ""
        asked = []
        while (observation := session.observe()) is not None:
            if observation.wants_action:
                asked.append(observation.text)
                session.act("")
            else:
                assert not asked
                told += observation.text
        assert len(asked) == 4 and " ".join(asked) == session.question
        assert sum(filler in told for filler in FILLERS) >= 1
        for question in task.payload["questions"]:
            assert question["answer"] in told


def test_the_reward_is_the_mean_f1_and_a_missing_answer_scores_0() -> None:
    (task,) = _tasks("train", 1)
    gold = [question["answer"] for question in task.payload["questions"]]
    session = ENVIRONMENT.start(task)
    session.act(gold[0].upper() + ".")
    session.act(f"{gold[1]} zzz")
    outcome = session.outcome()
    f1 = 2 * len(gold[1].split()) / (2 * len(gold[1].split()) + 1)
    assert outcome.reward == pytest.approx((1 + f1) / 4) == outcome.reward_parts["f1"]
    assert outcome.reward_parts["em"] == 0.25
    assert [answer.prediction for answer in outcome.answers] == [
        gold[0].upper() + ".",
        f"{gold[1]} zzz",
        "",
        "",
    ]
    assert [answer.gold for answer in outcome.answers] == [(right,) for right in gold]


def test_gold_flashcards_are_the_facts_in_the_context() -> None:
    for task in _tasks("train", 30):
        asked = {question["question"]: question["answer"] for question in task.payload["questions"]}
        shown: dict[str, str] = {}
        for text in task.payload["sessions"]:
            blind = ENVIRONMENT.demonstrate_flashcards(task, text, question_blind=True)
            assert len(blind) == 2 and all(card.answer in text for card in blind)
            for card in ENVIRONMENT.demonstrate_flashcards(task, text, question_blind=False):
                assert card.answer in text
                shown[card.question] = card.answer
        assert shown == asked
        assert ENVIRONMENT.demonstrate_flashcards(task, "nothing of it", question_blind=True) == ()


def test_bad_input_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="at most 36"):
        RecallEnvironment(RecallConfig(sessions=10, facts_per_session=5))
    with pytest.raises(TaskError, match="task x: its payload has no 'sessions'"):
        ENVIRONMENT.start(Task("x", "recall", {}, 0))


def test_the_factory_builds_it() -> None:
    assert build_environment(EnvironmentConfig(), EmbedderConfig()).name == "recall"


def test_more_small_talk_than_there_is_is_refused() -> None:
    RecallEnvironment(RecallConfig(filler_sentences=len(FILLERS)))
    with pytest.raises(ValueError, match=r"recall\.filler_sentences=\d+ is not allowed: it must be at most"):
        RecallEnvironment(RecallConfig(filler_sentences=len(FILLERS) + 1))
