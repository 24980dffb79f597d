"""Recall's questions that nobody answered: how they are asked, scored, taught, and asked beside a card."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Literal

import pytest

from actors.environments.recall import RecallEnvironment
from actors.environments.recall_questions import (
    KINDS,
    SAME_PERSON,
    STRANGER,
    abstains,
    recall_scores,
    subject_of,
)
from actors.environments.recall_words import MORE_PEOPLE, PEOPLE, RELATIONS
from actors.types import Flashcard, Task
from configs.bounds import BoundError
from configs.load import ConfigError, load_config
from configs.schema import RecallConfig

Split = Literal["train", "eval"]


def _environment(unknown: int, asked: Literal["written", "other"] = "written") -> RecallEnvironment:
    return RecallEnvironment(
        RecallConfig(sessions=2, facts_per_session=2, questions=3, unknown_questions=unknown, asked=asked)
    )


def _tasks(environment: RecallEnvironment, split: Split, count: int) -> list[Task]:
    return list(itertools.islice(environment.tasks(split, 3, 0), count))


def _told(task: Task) -> dict[str, str]:
    """The relation that was told of each person."""
    subjects = (subject_of(fact["plain_question"]) for fact in task.payload["facts"])
    return {subject.person: subject.relation.name for subject in subjects if subject is not None}


# --- what is asked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [1, 2, 5])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_questions_that_nobody_answered_are_mixed_among_the_told_ones(split: Split, unknown: int) -> None:
    plain, environment = _environment(0), _environment(unknown)
    kinds: Counter[str] = Counter()
    first = 0
    for before, task in zip(_tasks(plain, split, 60), _tasks(environment, split, 60), strict=True):
        questions = task.payload["questions"]
        told = [question for question in questions if "unknown" not in question]
        others = [question for question in questions if "unknown" in question]
        # What is told and asked is what it is without them.
        assert sorted(map(str, told)) == sorted(map(str, before.payload["questions"]))
        assert (task.payload["sessions"], task.payload["facts"], task.seed, task.id) == (
            before.payload["sessions"],
            before.payload["facts"],
            before.seed,
            before.id,
        )
        assert len(others) == unknown == len({question["question"] for question in others})
        relations = _told(task)
        for question in others:
            subject = subject_of(question["question"])
            assert subject is not None and question["answer"] == "I don't know"
            is_stranger = subject.person not in relations
            assert question["unknown"] == (STRANGER if is_stranger else SAME_PERSON)
            assert relations.get(subject.person) != subject.relation.name
            assert subject.person in PEOPLE[split]
        counts = Counter(question["unknown"] for question in others)
        assert abs(counts[STRANGER] - counts[SAME_PERSON]) <= 1
        kinds += counts
        first += "unknown" in questions[0]
    assert min(kinds.values()) > 20 * unknown and 0 < first < 60


def test_a_setting_that_asks_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recall\.unknown_questions=12 is not allowed: .* at most 10"):
        RecallEnvironment(RecallConfig(sessions=1, facts_per_session=31, questions=1, unknown_questions=12))
    with pytest.raises(BoundError, match="unknown_questions=-1 is not allowed: it must be 0 or more"):
        RecallConfig(unknown_questions=-1)
    with pytest.raises(ConfigError, match=r"recall\.unknown_questions=66 .* at most rollout\.max_turns=64"):
        load_config(None, ["environment.recall.unknown_questions=64"])


def test_other_words_are_for_held_out_people_and_for_no_card() -> None:
    written, other = _environment(2), _environment(2, asked="other")
    assert _tasks(written, "train", 20) == _tasks(other, "train", 20)
    unwritten = {relation.name: relation.unwritten_question for relation in RELATIONS}
    for plain, task in zip(_tasks(written, "eval", 40), _tasks(other, "eval", 40), strict=True):
        assert task.payload["sessions"] == plain.payload["sessions"]
        asked = [question["question"] for question in task.payload["questions"]]
        for question in task.payload["questions"]:
            subject = subject_of(question["question"])
            assert subject is not None
            assert question["question"] == unwritten[question["relation"]].format(name=subject.person)
        told = " ".join(task.payload["sessions"])
        for blind in (True, False):
            cards = other.demonstrate_flashcards(task, told, blind)
            assert cards == written.demonstrate_flashcards(plain, told, blind)
            assert len(cards) == (4 if blind else 3)
            assert not {word for card in cards for word in other.wordings(card.question)} & set(asked)


# --- how a reply is scored --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "I don't know.",
        "I don\u2019t know",
        "i dont know",
        "I do not know that.",
        "Unknown",
        "I have no idea.",
        "I'm not sure.",
        "I am not certain what pet Nora has.",
        "I'm sorry, but I don't have that information.",
        "As an AI, I don't have access to personal",
        "I don't have enough information to answer.",
        "You haven't told me.",
        "You did not mention it.",
        "You never told me that.",
        "I was never told.",
        "I was not given this information.",
        "Nobody told me.",
        "I can't recall.",
        "I cannot say.",
        "I don't really remember",
        "It was not mentioned.",
        "I have no record of that.",
        "Unable to answer.",
    ],
)
def test_ways_of_saying_that_one_does_not_know(reply: str) -> None:
    assert abstains(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Lisbon",
        "She knows how to sail.",
        "I know: Lisbon.",
        "Nora does not have a pet.",
        "a well-known baker",
        "You told me: Lisbon",
        "The capital, I am sure",
        "Not a dog but a cat",
        "No",
    ],
)
def test_an_answer_is_no_abstention(reply: str) -> None:
    assert not abstains(reply)


@pytest.mark.parametrize(
    ("reply", "answer", "f1", "kind"),
    [
        ("Lisbon", "Lisbon", 1.0, ""),
        ("She lives in Lisbon!", "Lisbon", 0.4, ""),
        ("the 7th of April", "April 7", 1 / 3, ""),
        ("April 10", "April 7", 0.5, "told_elsewhere"),
        ("a printer, of course", "Lisbon", 0.0, "told_elsewhere"),
        ("Paris", "Lisbon", 0.0, "made_up"),
        ("I don't know.", "Lisbon", 0.0, "abstained"),
        ("I don't know, April 10?", "Lisbon", 0.0, "told_elsewhere"),
        (" ... ", "Lisbon", 0.0, ""),
        ("New Years Eve", "New Year's Eve", 1.0, ""),
        ("I don't know", None, 1.0, "abstained"),
        ("Nobody told me.", None, 1.0, "abstained"),
        ("Lisbon", None, 0.0, "told_elsewhere"),
        ("I don't know: Lisbon", None, 0.0, "told_elsewhere"),
        ("Rome", None, 0.0, "made_up"),
        ("", None, 0.0, ""),
    ],
)
def test_a_reply_is_of_one_kind(reply: str, answer: str | None, f1: float, kind: str) -> None:
    scores = recall_scores(reply, answer, {"Lisbon", "April 7", "April 10", "printer"})
    assert scores["f1"] == pytest.approx(f1)
    assert scores["em"] == float(f1 == 1)
    assert {name for name in KINDS if scores[name]} == ({kind} if kind else set())


def test_an_episode_shows_the_kinds_apart_and_is_rewarded_by_f1() -> None:
    environment = _environment(2)
    (task,) = _tasks(environment, "eval", 1)
    answers = [fact["answer"] for fact in task.payload["facts"]]
    session = environment.start(task)
    while (observation := session.observe()) is not None:
        if observation.wants_action:
            session.act(answers[0])  # a memory that gives one written answer to any question
    outcome = session.outcome()
    unknown = {answer.category: answer for answer in outcome.answers if answer.gold == ("I don't know",)}
    assert set(unknown) == {STRANGER, SAME_PERSON}
    assert all(answer.scores["told_elsewhere"] == 1 for answer in unknown.values())
    right = sum(answer.gold == (answers[0],) for answer in outcome.answers)
    assert outcome.reward == outcome.reward_parts["f1"] == pytest.approx(right / 5)
    assert outcome.reward_parts["told_elsewhere"] == pytest.approx((5 - right) / 5)
    silent = environment.start(task)
    while (observation := silent.observe()) is not None:
        if observation.wants_action:
            silent.act("I don't know.")
    assert silent.outcome().reward == pytest.approx(2 / 5)
    assert silent.outcome().reward_parts["abstained"] == 1


# --- what is asked beside a card --------------------------------------------------------------------------


@pytest.mark.parametrize("person", ["Nora", "Stella", "James", "Zoë", "Mary Ann", "O'Neil", "Xqz"])
def test_each_wording_is_recognised_for_any_name(person: str) -> None:
    for relation in RELATIONS:
        for wording in (*relation.questions, relation.unwritten_question):
            question = wording.format(name=person)
            for form in (question, question.rstrip("?").replace("'s ", "\u2019s "), f" {question}  "):
                subject = subject_of(form)
                assert subject is not None and subject.relation is relation, form
                assert subject.person == person


@pytest.mark.parametrize(
    "question", ["", "Who is the mayor of Lisbon?", "Where does live?", "Where does she live?", "Nora?"]
)
def test_another_question_has_no_questions_beside_it(question: str) -> None:
    environment = _environment(0)
    card = Flashcard(question or "?", "x")
    assert environment.questions_beside(card, ()) == ()
    assert environment.wordings(question) == (question,)


def test_questions_beside_a_card_are_the_persons_other_relations() -> None:
    environment = _environment(0)
    card = Flashcard("where does Nora live", "Lisbon")
    known = ["What pet does Nora have?", "What does Tom like to eat?", "What has Nora purchased?", "Why?"]
    beside = environment.questions_beside(card, known)
    subjects = [subject_of(question) for question in beside]
    assert {subject.relation.name for subject in subjects if subject} == {
        relation.name for relation in RELATIONS
    } - {"home", "pet", "purchase"}
    assert {subject.person for subject in subjects if subject} == {"Nora"}
    wording = [subject.wordings.index(q) for q, subject in zip(beside, subjects, strict=True) if subject]
    assert wording in ([0, 1] * 3, [1, 0] * 3)
    assert beside == environment.questions_beside(card, known)  # a fixed order
    first = {
        environment.questions_beside(Flashcard(f"Where does {person} live?", "x"), ())[0].replace(person, "")
        for person in PEOPLE["eval"]
    }
    assert len(first) > 8  # not always the same relation or wording


def test_other_questions_are_about_training_people() -> None:
    environment = _environment(0)
    questions = environment.other_questions(200, seed=4)
    subjects = [subject_of(question) for question in questions]
    assert len(set(subjects)) == 200 and None not in subjects
    assert all(subject.person in PEOPLE["train"] for subject in subjects if subject)
    assert {q == s.wordings[0] for q, s in zip(questions, subjects, strict=True) if s} == {True, False}
    assert questions == _environment(2).other_questions(200, seed=4) != environment.other_questions(200, 5)
    assert len(environment.other_questions(10**6, 0)) == len(PEOPLE["train"]) * len(RELATIONS)
    wide = RecallEnvironment(RecallConfig(vocabulary="wide")).other_questions(500, 0)
    people = {subject.person for question in wide if (subject := subject_of(question))}
    assert people & set(MORE_PEOPLE) and not people & set(PEOPLE["eval"])


# --- how it is taught -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sessions", "facts", "filler"), [(1, 1, 0), (1, 2, 1), (2, 2, 2)])
def test_an_unknown_answer_is_taught_beside_the_same_question_with_its_answer(
    sessions: int, facts: int, filler: int
) -> None:
    environment = RecallEnvironment(RecallConfig(sessions, facts, 1, filler))
    with_text = earlier = earlier_told = 0
    for task in _tasks(environment, "train", 100):
        untold, told = environment.demonstrate_unknown(task)
        (question, reply), (again, answer) = untold.turns[-1], told.turns[-1]
        (text,) = told.texts
        assert question == again and reply == "I don't know." and answer in text
        assert text in task.payload["sessions"]
        fact = next(f for f in task.payload["facts"] if f["answer"] == answer and f["sentence"] in text)
        subject, of_fact = subject_of(question), subject_of(fact["plain_question"])
        assert subject is not None and subject == of_fact
        assert not any(fact["sentence"] in part or subject.person in part for part in untold.texts)
        assert [asked for asked, _ in untold.turns] == [asked for asked, _ in told.turns]
        for exchange in (untold, told):
            for asked, replied in exchange.turns[:-1]:
                assert asked != question
                known = replied != "I don't know."
                assert not known or any(re.search(rf"\b{replied}\b", part) for part in exchange.texts)
                earlier += 1
                earlier_told += known
        with_text += len(untold.texts)
        assert environment.demonstrate_unknown(task) == (untold, told)
    assert 40 < earlier < 120  # two turns in two of five pairs
    assert (earlier_told > 5) == (facts > 1)
    assert 30 < with_text < 70 or (facts == 1 and filler == 0 and with_text == 0)
