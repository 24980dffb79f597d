"""Synthetic facts, told over several sessions, then questions about them. Tasks without end, no download.

    session 1: "Nora has moved to Lisbon. It rained all morning. Omar works as a baker."
    session 2: ...
    question:  "Where does Nora live?"   ->   "Lisbon"

Split, seed and position alone determine a task. Training and held-out tasks share neither people nor answers,
except dates, which differ by month. The reward is the mean token F1 over the questions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from actors.environments.base import ReadThenAsk, Split
from actors.environments.recall_words import FILLERS, MORE_PEOPLE, MORE_VALUES, PEOPLE, RELATIONS
from actors.environments.scoring import plain_em, plain_f1
from actors.protocols import TaskError
from actors.types import Answer, Flashcard, Outcome, Task
from configs.schema import RecallConfig

SYSTEM_PROMPT = "Remember what you are told. Answer questions in a few words."


@dataclass(frozen=True, slots=True)
class _Fact:
    """``question`` is how the task asks, ``plain_question`` the relation's first form. Part of a payload."""

    relation: str
    sentence: str
    question: str
    plain_question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The people of a split, and the answers to each of its relations."""

    people: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]


def vocabulary(split: Split, wide: bool) -> Vocabulary:
    """The words of a split; ``wide`` adds the words that only training has."""
    more = MORE_VALUES if wide else {}
    values = {relation.name: relation.values[split] + more.get(relation.name, ()) for relation in RELATIONS}
    return Vocabulary(PEOPLE[split] + (MORE_PEOPLE if wide else ()), values)


class RecallEnvironment:
    """The `recall` task source. It has no state: threads can share it."""

    name = "recall"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: RecallConfig) -> None:
        facts, most = config.sessions * config.facts_per_session, min(map(len, PEOPLE.values()))
        if facts > most:
            raise ValueError(
                f"recall.sessions * recall.facts_per_session={facts} is not allowed: "
                f"it must be at most {most}, one person a fact"
            )
        if config.filler_sentences > len(FILLERS):
            raise ValueError(
                f"recall.filler_sentences={config.filler_sentences} is not allowed: "
                f"it must be at most {len(FILLERS)}, lower it"
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
        """Cards of the facts told in ``text_in_context``.

        They are the facts that will be asked, in the words of their questions. Question-blind: all facts, in
        the plain words of their relation.
        """
        questions = {question["question"] for question in _field(task, "questions")}
        told = [fact for fact in _field(task, "facts") if fact["sentence"] in text_in_context]
        if question_blind:
            return tuple(Flashcard(fact["plain_question"], fact["answer"]) for fact in told)
        return tuple(
            Flashcard(fact["question"], fact["answer"]) for fact in told if fact["question"] in questions
        )

    def _task(self, split: Split, seed: int, position: int) -> Task:
        config, size = self._config, self._config.facts_per_session
        # Random hashes a text seed by itself, and equally in every process.
        rng = random.Random(f"recall/{split}/{seed}/{position}")
        words = self._words[split]
        facts = _facts(rng, words, rng.sample(words.people, config.sessions * size))
        chunks = [facts[place : place + size] for place in range(0, len(facts), size)]
        sessions = []
        for chunk in chunks:
            sentences = [fact.sentence for fact in chunk] + rng.sample(FILLERS, config.filler_sentences)
            rng.shuffle(sentences)
            sessions.append(" ".join(sentences))
        questions = [
            {"question": fact.question, "answer": fact.answer, "relation": fact.relation}
            for fact in _facts_to_ask(rng, chunks, config.questions)
        ]
        return Task(
            id=f"recall-{split}-{seed}-{position}",
            environment=self.name,
            payload={
                "sessions": sessions,
                "facts": [asdict(fact) for fact in facts],
                "questions": questions,
            },
            seed=rng.getrandbits(31),
        )


class RecallSession(ReadThenAsk):
    """One episode: every session, then every question."""

    def __init__(self, task: Task) -> None:
        sessions, self._questions = _field(task, "sessions"), _field(task, "questions")
        super().__init__(sessions, [question["question"] for question in self._questions])

    def outcome(self) -> Outcome:
        answers = tuple(map(_answer, self._questions, self.answers))
        parts = {name: sum(answer.scores[name] for answer in answers) / len(answers) for name in ("f1", "em")}
        return Outcome(reward=parts["f1"], reward_parts=parts, answers=answers)


def _answer(question: dict[str, str], prediction: str) -> Answer:
    gold = question["answer"]
    return Answer(
        question=question["question"],
        gold=(gold,),
        prediction=prediction,
        category=question["relation"],
        scores={"f1": plain_f1(prediction, gold), "em": plain_em(prediction, gold)},
    )


def _facts(rng: random.Random, words: Vocabulary, people: list[str]) -> list[_Fact]:
    """One fact a person, so a question has one right answer. Answers repeat when their list is used up."""
    facts: list[_Fact] = []
    used: set[str] = set()
    for person in people:
        relation = rng.choice(RELATIONS)
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


def _facts_to_ask(rng: random.Random, chunks: list[list[_Fact]], count: int) -> list[_Fact]:
    """Choose ``count`` facts, in random order.

    They are spread over the sessions: a session gives its second fact only after each session gave one.
    """
    shuffled = [rng.sample(chunk, len(chunk)) for chunk in rng.sample(chunks, len(chunks))]
    dealt = [fact for round_ in zip(*shuffled, strict=True) for fact in round_]
    return rng.sample(dealt[:count], count)


def _field(task: Task, name: str) -> list[Any]:
    try:
        value = task.payload[name]
    except KeyError:
        raise TaskError(f"task {task.id}: its payload has no {name!r}, so it is not a recall task") from None
    if not isinstance(value, list):
        raise TaskError(f"task {task.id}: {name!r} must be a list, got {type(value).__name__}")
    return value
