"""Synthetic facts, told over several sessions, then questions about them. Tasks without end, no download.

    session 1: "Nora has moved to Lisbon. It rained all morning. Omar works as a baker."
    session 2: ...
    question:  "Where does Nora live?"   ->   "Lisbon"

Split, seed and position alone determine a task. Training and held-out tasks share neither people nor answers,
except dates, which differ by month. The reward is the mean token F1 over the questions.

``recall.unknown_questions`` adds questions whose answer nobody told, as LongMemEval does (arXiv 2410.10813):
half about a person of whom nothing was told, half about another relation of a told person. There a reply
that says so scores 1. Their categories, `stranger` and `same_person`, show them apart in every report.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from actors.environments.base import Exchange, ReadThenAsk, Split
from actors.environments.recall_questions import (
    SAME_PERSON,
    STRANGER,
    UNKNOWN,
    Subject,
    other_subjects,
    recall_scores,
    stable_hash,
    subject_of,
)
from actors.environments.recall_words import FILLERS, MORE_PEOPLE, MORE_VALUES, PEOPLE, RELATIONS, Relation
from actors.environments.scoring import plain_em, scored
from actors.protocols import TaskError
from actors.types import Answer, CardUse, Flashcard, Outcome, Task
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
        self._relations = tuple(r for r in RELATIONS if not config.relations or r.name in config.relations)
        others = facts * (len(self._relations) - 1)
        unknown, left = config.unknown_questions, min(most - facts, others)
        if (unknown + 1) // 2 > left:
            raise ValueError(
                f"recall.unknown_questions={unknown} is not allowed: it must be at most {2 * left}, "
                f"since {facts} facts leave {most - facts} people untold and "
                f"{others} other relations of told people"
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
        the plain words of their relation. They come in the order of the text, so that a writer can tell which
        fact is next.
        """
        questions = {question.get("written", question["question"]) for question in _field(task, "questions")}
        facts = [fact for fact in _field(task, "facts") if fact["sentence"] in text_in_context]
        told = sorted(facts, key=lambda fact: text_in_context.index(fact["sentence"]))
        if question_blind:
            return tuple(Flashcard(fact["plain_question"], fact["answer"]) for fact in told)
        return tuple(
            Flashcard(fact["question"], fact["answer"]) for fact in told if fact["question"] in questions
        )

    def wordings(self, question: str) -> tuple[str, ...]:
        """``question`` and the relation's other written wording; ``question`` alone where it is unknown."""
        subject = subject_of(question)
        return (question,) if subject is None else tuple(dict.fromkeys((question, *subject.wordings)))[:2]

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        """At most ``count`` questions about training people, each about another subject."""
        rng = random.Random(f"recall/other questions/{seed}")
        pairs = list(itertools.product(self._words["train"].people, self._relations))
        chosen = rng.sample(pairs, min(count, len(pairs)))
        return tuple(rng.choice(Subject(*pair).wordings) for pair in chosen)

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        """Questions about the other relations of the card's person; the two wordings alternate.

        The order is the card's own, so that cards in two wordings do not name the same question first.
        """
        subject = subject_of(card.question)
        if subject is None:
            return ()
        others = other_subjects(subject, self._relations, known, card.question)
        first = stable_hash(card.question)
        return tuple(other.wordings[(first + place) % 2] for place, other in enumerate(others))

    def use_of(self, task: Task, card: Flashcard) -> CardUse:
        """By person and relation, in any of the relation's wordings, and by the words of the answer.

        A card with a fact's person and answer was meant for it, whatever it asks. So it also counts for the
        questions about the fact: these pay for asking amiss, and no other card does.
        """
        subject = subject_of(card.question)
        if subject is None:
            return CardUse((), right=False)
        facts = (
            subject_of(fact["plain_question"])
            for fact in _field(task, "facts")
            if plain_em(card.answer, fact["answer"]) == 1
        )
        meant = {fact for fact in facts if fact is not None and fact.person == subject.person}
        return CardUse(_places(task, {subject, *meant}), right=subject in meant)

    def questions_told(self, task: Task, text: str) -> tuple[int, ...]:
        """The questions about the facts whose sentences stand in ``text``."""
        told = (fact for fact in _field(task, "facts") if fact["sentence"] in text)
        return _places(task, {subject for fact in told if (subject := subject_of(fact["plain_question"]))})

    def demonstrate_unknown(self, task: Task) -> tuple[Exchange, Exchange]:
        """A question that nothing in the context answers, and the same behind the text that tells the answer.

        In half of the pairs the first exchange also has a text: the same without that fact. So a text alone
        is no sign of an answer. In two of five pairs both begin with another question and its answer.
        """
        rng = random.Random(f"recall/unknown/{task.id}")
        facts = [_Fact(**fact) for fact in _field(task, "facts")]
        fact = rng.choice(facts)
        told = next(text for text in _field(task, "sessions") if fact.sentence in text)
        rest = " ".join(told.replace(fact.sentence, "").split())
        without = (rest,) if rest and rng.random() < 0.5 else ()
        questions: list[tuple[str, _Fact | None]] = [self._worded(fact, rng)]
        if rng.random() < 0.4:
            questions.insert(0, self._earlier_question(fact, facts, rng))
        return _exchange(without, questions), _exchange((told,), questions)

    def _worded(self, fact: _Fact, rng: random.Random) -> tuple[str, _Fact]:
        return rng.choice(self.wordings(fact.plain_question)), fact

    def _earlier_question(
        self, fact: _Fact, facts: list[_Fact], rng: random.Random
    ) -> tuple[str, _Fact | None]:
        """About another fact, or about another relation of the same person, which nobody told."""
        others = [self._worded(other, rng) for other in facts if other is not fact]
        if others and rng.random() < 0.5:
            return rng.choice(others)
        return rng.choice(self.questions_beside(Flashcard(fact.plain_question, fact.answer), ())), None

    def _task(self, split: Split, seed: int, position: int) -> Task:
        config, size = self._config, self._config.facts_per_session
        # Random hashes a text seed by itself, and equally in every process.
        rng = random.Random(f"recall/{split}/{seed}/{position}")
        words = self._words[split]
        people = rng.sample(words.people, config.sessions * size)
        facts = _facts(rng, words, people, self._relations)
        chunks = [facts[place : place + size] for place in range(0, len(facts), size)]
        sessions = []
        for chunk in chunks:
            sentences = [fact.sentence for fact in chunk] + rng.sample(FILLERS, config.filler_sentences)
            rng.shuffle(sentences)
            sessions.append(" ".join(sentences))
        asked = _facts_to_ask(rng, chunks, config.questions)
        seed_of_task = rng.getrandbits(31)
        other = config.asked == "other" and split == "eval"
        questions = [_in_other_words(fact) if other else _as_written(fact) for fact in asked]
        if config.unknown_questions:
            # All else is drawn by now: what is told and asked stays as it is without such questions.
            told = dict(zip(people, facts, strict=True))
            questions += self._unknown_questions(rng, words, told, other)
            rng.shuffle(questions)
        return Task(
            id=f"recall-{split}-{seed}-{position}",
            environment=self.name,
            payload={
                "sessions": sessions,
                "facts": [asdict(fact) for fact in facts],
                "questions": questions,
            },
            seed=seed_of_task,
        )

    def _unknown_questions(
        self, rng: random.Random, words: Vocabulary, told: Mapping[str, _Fact], other: bool
    ) -> list[dict[str, str]]:
        """``unknown`` is the question's category. ``other``: in the wording that no card has."""
        questions = []
        count, relations = self._config.unknown_questions, self._relations
        for kind, subject in _unknown_subjects(rng, words, told, relations, count):
            written, relation = rng.choice(subject.wordings), subject.relation
            question = subject.ask(relation.unwritten_question) if other else written
            about = {"question": question, "answer": UNKNOWN, "relation": relation.name}
            questions.append({**about, "unknown": kind})
        return questions


class RecallSession(ReadThenAsk):
    """One episode: every session, then every question."""

    def __init__(self, task: Task) -> None:
        sessions, self._questions = _field(task, "sessions"), _field(task, "questions")
        super().__init__(sessions, [question["question"] for question in self._questions])
        self._told = {fact["answer"] for fact in _field(task, "facts")}

    def outcome(self) -> Outcome:
        return scored(tuple(map(self._answer, self._questions, self.answers)))

    def _answer(self, question: dict[str, str], prediction: str) -> Answer:
        gold, unknown = question["answer"], question.get("unknown")
        return Answer(
            question=question["question"],
            gold=(gold,),
            prediction=prediction,
            category=unknown or question["relation"],
            scores=recall_scores(prediction, None if unknown else gold, self._told),
        )


def _places(task: Task, subjects: Set[Subject]) -> tuple[int, ...]:
    """The places of the questions about one of ``subjects``."""
    asked = enumerate(question["question"] for question in _field(task, "questions"))
    return tuple(place for place, question in asked if subject_of(question) in subjects)


def _as_written(fact: _Fact) -> dict[str, str]:
    return {"question": fact.question, "answer": fact.answer, "relation": fact.relation}


def _in_other_words(fact: _Fact) -> dict[str, str]:
    """``written`` keeps the question in whose words a card may be demonstrated."""
    subject = subject_of(fact.plain_question)
    assert subject is not None, fact
    return {
        **_as_written(fact),
        "question": subject.ask(subject.relation.unwritten_question),
        "written": fact.question,
    }


def _unknown_subjects(
    rng: random.Random,
    words: Vocabulary,
    told: Mapping[str, _Fact],
    relations: Sequence[Relation],
    count: int,
) -> list[tuple[str, Subject]]:
    """``count`` subjects that nobody told of, by their category: half strangers, half told people."""
    strangers = count // 2 + (rng.randrange(2) if count % 2 else 0)
    people = rng.sample([person for person in words.people if person not in told], strangers)
    others = [
        Subject(person, relation)
        for person, fact in told.items()
        for relation in relations
        if relation.name != fact.relation
    ]
    return [
        *((STRANGER, Subject(person, rng.choice(relations))) for person in people),
        *((SAME_PERSON, subject) for subject in rng.sample(others, count - strangers)),
    ]


def _exchange(texts: tuple[str, ...], questions: Sequence[tuple[str, _Fact | None]]) -> Exchange:
    """Each question with its answer where ``texts`` tell it, else with the reply that it is not known."""
    context = " ".join(texts)
    turns = (
        (question, fact.answer if fact is not None and fact.sentence in context else f"{UNKNOWN}.")
        for question, fact in questions
    )
    return Exchange(texts, tuple(turns))


def _facts(
    rng: random.Random, words: Vocabulary, people: list[str], relations: Sequence[Relation]
) -> list[_Fact]:
    """One fact a person, so a question has one right answer. Answers repeat when their list is used up."""
    facts: list[_Fact] = []
    used: set[str] = set()
    for person in people:
        relation = rng.choice(relations)
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
