"""Synthetic facts told over several sessions, then questions about some of them: unlimited tasks, nothing to download.

    session 1: "Nora has moved to Lisbon. It rained all morning. Omar works as a baker."
    session 2: ...
    question:  "Where does Nora live?"   ->   "Lisbon"

Split, seed and position alone determine a task. Training and held-out tasks share neither people nor answers (except dates, which differ by month).
The reward is the mean token F1 over the questions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.environments.base import Observation, Split
from actors.environments.recall_wide import MORE_PEOPLE, MORE_VALUES
from actors.environments.recall_words import FILLERS, PEOPLE, RELATIONS, Relation
from actors.environments.scoring import plain_em, plain_f1
from actors.protocols import TaskError
from actors.types import Answer, Flashcard, Outcome, Task
from configs.schema import RecallConfig

SYSTEM_PROMPT = "Remember what you are told. Answer questions in a few words."


@dataclass(frozen=True, slots=True)
class _Fact:
    relation: str
    sentence: str
    question: str
    plain_question: str
    answer: str

    def as_json(self) -> dict[str, str]:
        return {
            "relation": self.relation,
            "sentence": self.sentence,
            "question": self.question,
            "plain_question": self.plain_question,
            "answer": self.answer,
        }


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The people of a split, and the answers to each of its relations."""

    people: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]


def vocabulary(split: Split, wide: bool) -> Vocabulary:
    """``wide``: with the words that only training has."""
    more = MORE_VALUES if wide else {}
    values = {relation.name: relation.values[split] + more.get(relation.name, ()) for relation in RELATIONS}
    return Vocabulary(PEOPLE[split] + (MORE_PEOPLE if wide else ()), values)


class RecallEnvironment:
    """The `recall` task source. Stateless: it can be shared between threads and rebuilt anywhere from its config."""

    name = "recall"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: RecallConfig) -> None:
        facts = config.sessions * config.facts_per_session
        room = min(len(names) for names in PEOPLE.values())
        if facts > room:
            raise ValueError(
                f"recall.sessions * recall.facts_per_session={facts} is not allowed: it must be at most {room}, one person a fact"
            )
        if config.filler_sentences > len(FILLERS):
            raise ValueError(
                f"recall.filler_sentences={config.filler_sentences} is not allowed: it must be at most {len(FILLERS)}, lower it"
            )
        self._config = config
        self._words = {
            "train": vocabulary("train", wide=config.vocabulary == "wide"),
            "eval": vocabulary("eval", wide=False),
        }

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless; see Environment.tasks."""
        return (self._task(split, seed, position) for position in itertools.count(start))

    def start(self, task: Task) -> RecallSession:
        return RecallSession(task)

    def demonstrate_flashcards(
        self, task: Task, text_in_context: str, question_blind: bool
    ) -> tuple[Flashcard, ...]:
        """The told facts that stand in ``text_in_context``: those that will be asked, as they will be asked, or (blind) all, asked plainly."""
        asked = {question["question"] for question in _field(task, "questions")}
        told = [fact for fact in _field(task, "facts") if fact["sentence"] in text_in_context]
        if question_blind:
            return tuple(Flashcard(fact["plain_question"], fact["answer"]) for fact in told)
        return tuple(
            Flashcard(fact["question"], fact["answer"]) for fact in told if fact["question"] in asked
        )

    def _task(self, split: Split, seed: int, position: int) -> Task:
        config = self._config
        rng = random.Random(
            f"recall/{split}/{seed}/{position}"
        )  # a text seed is hashed by Random itself, equally in every process
        words = self._words[split]
        people = rng.sample(words.people, config.sessions * config.facts_per_session)
        facts = _facts(rng, words, people)
        chunks = [
            facts[i * config.facts_per_session : (i + 1) * config.facts_per_session]
            for i in range(config.sessions)
        ]
        sessions = []
        for chunk in chunks:
            sentences = [fact.sentence for fact in chunk] + rng.sample(FILLERS, config.filler_sentences)
            rng.shuffle(sentences)
            sessions.append(" ".join(sentences))
        asked = _asked(rng, chunks, config.questions)
        payload = {
            "sessions": sessions,
            "facts": [fact.as_json() for fact in facts],
            "questions": [
                {"question": fact.question, "answer": fact.answer, "relation": fact.relation}
                for fact in asked
            ],
        }
        return Task(
            id=f"recall-{split}-{seed}-{position}",
            environment=self.name,
            payload=payload,
            seed=rng.getrandbits(31),
        )


class RecallSession:
    """One episode's view of a recall task: every session, then every question."""

    def __init__(self, task: Task) -> None:
        self._sessions: list[str] = list(_field(task, "sessions"))
        self._questions: list[dict[str, str]] = list(_field(task, "questions"))
        self._next = 0
        self._predictions: list[str] = []

    @property
    def question(self) -> str:
        return " ".join(question["question"] for question in self._questions)

    def observe(self) -> Observation | None:
        place = self._next
        self._next += 1
        if place < len(self._sessions):
            return Observation(self._sessions[place], wants_action=False)
        if place < len(self._sessions) + len(self._questions):
            return Observation(self._questions[place - len(self._sessions)]["question"], wants_action=True)
        return None

    def act(self, text: str) -> None:
        self._predictions.append(text.strip())

    def outcome(self) -> Outcome:
        answers = tuple(
            _answer(question, prediction)
            for question, prediction in itertools.zip_longest(
                self._questions, self._predictions, fillvalue=""
            )
            if question
        )
        parts = {name: sum(answer.scores[name] for answer in answers) / len(answers) for name in ("f1", "em")}
        return Outcome(reward=parts["f1"], reward_parts=parts, answers=answers)


def _answer(question: dict[str, str] | str, prediction: dict[str, str] | str) -> Answer:
    assert isinstance(question, dict) and isinstance(prediction, str)
    gold = question["answer"]
    scores = {"f1": plain_f1(prediction, gold), "em": plain_em(prediction, gold)}
    return Answer(
        question=question["question"],
        gold=(gold,),
        prediction=prediction,
        category=question["relation"],
        scores=scores,
    )


def _facts(rng: random.Random, words: Vocabulary, people: list[str]) -> list[_Fact]:
    """One fact a person, so a question has one right answer; answers repeat only when their list is used up."""
    facts: list[_Fact] = []
    used: set[str] = set()
    for person in people:
        relation: Relation = rng.choice(RELATIONS)
        values = words.values[relation.name]
        value = rng.choice([value for value in values if value not in used] or values)
        used.add(value)
        fill = {"name": person, "value": value}
        facts.append(
            _Fact(
                relation=relation.name,
                sentence=rng.choice(relation.tellings).format(**fill),
                question=rng.choice(relation.questions).format(**fill),
                plain_question=relation.questions[0].format(**fill),
                answer=value,
            )
        )
    return facts


def _asked(rng: random.Random, chunks: list[list[_Fact]], questions: int) -> list[_Fact]:
    """The facts to ask about, in random order, spread over the sessions: none is asked about twice before each is asked about once."""
    shuffled = [rng.sample(chunk, len(chunk)) for chunk in rng.sample(chunks, len(chunks))]
    dealt = [fact for one_of_each in zip(*shuffled, strict=True) for fact in one_of_each]
    return rng.sample(dealt[:questions], questions)


def _field(task: Task, name: str) -> list[Any]:
    try:
        value = task.payload[name]
    except KeyError:
        raise TaskError(f"task {task.id}: its payload has no {name!r}, so it is not a recall task") from None
    if not isinstance(value, list):
        raise TaskError(f"task {task.id}: {name!r} must be a list, got {type(value).__name__}")
    return value
