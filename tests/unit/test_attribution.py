"""Which of an episode's questions its flashcards and its answers served, as the environment says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from actors.environments.base import Environment
from actors.environments.recall import RecallEnvironment
from actors.environments.recall_questions import subject_of
from actors.episodes.attribution import generations
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, CardUse, Flashcard, Generation, Sampling, Task, TrajectoryGroup
from configs.schema import MemoryConfig, RecallConfig, RolloutConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

ENVIRONMENT = RecallEnvironment(RecallConfig(sessions=2, facts_per_session=1, questions=2))
TASK = next(ENVIRONMENT.tasks("train", 0, 0))
FACTS: list[dict[str, str]] = TASK.payload["facts"]
ASKED = [question["answer"] for question in TASK.payload["questions"]]
PLACES = [ASKED.index(fact["answer"]) for fact in FACTS]
"""The place among the questions of each session's fact."""


def play(
    chat: ChatFormat,
    extract: Callable[[int], str],
    environment: Environment = ENVIRONMENT,
    memory: str = "parametric",
    task: Task = TASK,
) -> TrajectoryGroup:
    """One episode. ``extract``: what is written of the session whose number it is given."""

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        if sampling.kind == "act":
            return sampled(chat.reply("no idea"))
        context = chat.decode(prompt_ids)
        told = [number for number, fact in enumerate(task.payload["facts"]) if fact["sentence"] in context]
        is_summary = "JSON" not in context
        return sampled(chat.reply("a summary" if is_summary else extract(told[-1])))

    rollout = Rollout(
        ScriptedPolicy(script),
        ScriptedWriter(),
        environment,
        chat,
        WriteConfig(),
        RolloutConfig(),
        8,
        SURROUNDINGS,
        "basis",
        "worker-0",
    )
    config: Any = {"policy": memory, "max_summary_tokens": 10} if memory == "hybrid" else {"policy": memory}
    request = RolloutRequest(task, "g", 1, MemoryConfig(max_context_tokens=30, **config), 1.0, 8, 1)
    return asyncio.run(rollout.group(request))


def served(group: TrajectoryGroup) -> list[tuple[str, tuple[int, ...] | None]]:
    (episode,) = group.trajectories
    return [(span.kind, span.serves) for part in episode.segments for span in part.spans]


def cards(*pairs: tuple[str, str]) -> str:
    return json.dumps([{"instruction": question, "output": answer} for question, answer in pairs])


def test_an_extraction_served_what_its_cards_are_about_and_an_answer_its_own_question(
    chat: ChatFormat,
) -> None:
    def extract(session: int) -> str:
        fact = FACTS[session]
        return cards((fact["plain_question"], fact["answer"] if session == 0 else "nothing of it"))

    group = play(chat, extract)
    assert sorted(set(served(group))) == [
        ("act", (0,)),
        ("act", (1,)),
        *sorted([("extract", (PLACES[0],)), ("extract", (PLACES[1],))]),
    ]
    uses = [record.uses for record in group.trajectories[0].writes]
    assert uses == [(CardUse((PLACES[0],), True),), (CardUse((PLACES[1],), False),)]


def test_what_is_thought_in_front_of_the_cards_takes_no_credit_from_them(chat: ChatFormat) -> None:
    def extract(session: int) -> str:
        return (
            f"<think>A name.</think>\n\n{cards((FACTS[session]['plain_question'], FACTS[session]['answer']))}"
        )

    found = [serves for kind, serves in served(play(chat, extract)) if kind == "extract"]
    assert list(dict.fromkeys(found)) == [(PLACES[0],), (PLACES[1],)]


def test_without_a_card_that_serves_it_is_what_the_context_tells(chat: ChatFormat) -> None:
    stray = cards(("Where does Xqz live?", "Oslo"))
    group = play(chat, lambda session: "no list" if session == 0 else stray)
    assert served(group)[:2] == [("extract", (PLACES[0],)), ("extract", (PLACES[1],))]
    assert [record.uses for record in group.trajectories[0].writes] == [(), (CardUse((), False),)]


PAIR = RecallEnvironment(RecallConfig(sessions=1, facts_per_session=2, questions=2))
PAIR_TASK = next(PAIR.tasks("train", 0, 0))
FIRST, SECOND = sorted(
    (PAIR.questions_told(PAIR_TASK, fact["sentence"])[0], fact["plain_question"], fact["answer"])
    for fact in PAIR_TASK.payload["facts"]
)
JUNK = ("Where does Xqz live?", SECOND[2])


@pytest.mark.parametrize(
    ("written", "serves"),
    [
        ((FIRST[1:], SECOND[1:]), [(0,), (1,), (0, 1)]),  # each its own; the end of the list shares both
        ((SECOND[1:], FIRST[1:], SECOND[1:]), [(1,), (0,), (1,), (0, 1)]),
        ((FIRST[1:], (SECOND[1], "x")), [(0,), (1,), (0, 1)]),  # a wrong answer is about its question too
        (
            (FIRST[1:], FIRST[1:]),
            [(0, 1), (0, 1), (1,)],
        ),  # the second fact is forgotten: all have a share in it
        ((FIRST[1:], JUNK), [(0, 1), (1,), (1,)]),  # and what stands in its place has nothing else
        ((FIRST[1:], JUNK, SECOND[1:]), [(0,), (0, 1), (1,), (0, 1)]),
        ((JUNK, JUNK), [(0, 1)]),
        ((), [(0, 1)]),
    ],
)
def test_a_cards_tokens_served_its_own_question_and_what_the_extraction_forgot(
    chat: ChatFormat, written: Sequence[tuple[str, str]], serves: list[tuple[int, ...]]
) -> None:
    text = cards(*written)
    (episode,) = play(chat, lambda session: text, PAIR, task=PAIR_TASK).trajectories
    segment, (*spans,) = next(
        (part, spans)
        for part in episode.segments
        for spans in generations(part)
        if spans[0].kind == "extract"
    )
    assert [span.serves for span in spans] == serves
    said = [chat.decode(segment.token_ids[span.start : span.end].tolist()) for span in spans]
    assert "".join(said) == text
    if len(serves) > 1:
        assert [part.count("instruction") for part in said] == [1] * len(written) + [0]


def test_a_summary_beside_the_cards_serves_the_whole_episode(chat: ChatFormat) -> None:
    group = play(chat, lambda session: cards((FACTS[session]["plain_question"], "x")), memory="hybrid")
    assert list(dict.fromkeys(served(group)))[:3] == [
        ("extract", None),
        ("extract", (PLACES[0],)),
        ("extract", (PLACES[1],)),
    ]


class Plain:
    """The same tasks from an environment that says nothing of cards."""

    name, system_prompt = ENVIRONMENT.name, ENVIRONMENT.system_prompt
    tasks, start = ENVIRONMENT.tasks, ENVIRONMENT.start


class Wrong(Plain):
    def __init__(self, use: CardUse | Exception) -> None:
        self._use = use

    def use_of(self, task: Task, card: Flashcard) -> CardUse:
        if isinstance(self._use, Exception):
            raise self._use
        return self._use

    def questions_told(self, task: Task, text: str) -> tuple[int, ...]:
        return ()


def test_an_environment_that_cannot_say_leaves_all_to_the_episode(chat: ChatFormat) -> None:
    group = play(chat, lambda session: cards(("a", "b")), Plain())
    assert {serves for _, serves in served(group)} == {None}
    assert {record.uses for record in group.trajectories[0].writes} == {()}


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (KeyError("facts"), r"the attribution of recall: KeyError: 'facts' \(tests"),
        (CardUse((0, 2), True), r"questions \[0, 2\], but there are 2 answers: places count from 0"),
    ],
)
def test_an_environment_that_fails_at_it_costs_the_episode_alone(
    chat: ChatFormat, use: CardUse | Exception, said: str
) -> None:
    group = play(chat, lambda session: cards(("a", "b")), Wrong(use))
    (failed,) = group.failed
    assert failed.boundary == "environment" and not group.trajectories
    assert re.search(said, failed.message)


@pytest.mark.parametrize("place", range(len(FACTS)))
def test_recall_knows_a_card_by_person_and_relation_in_any_wording(place: int) -> None:
    fact = FACTS[place]
    for question in (*ENVIRONMENT.wordings(fact["plain_question"]), fact["question"].rstrip("?")):
        use = ENVIRONMENT.use_of(TASK, Flashcard(question, fact["answer"].upper() + "."))
        assert use == CardUse((PLACES[place],), right=True)
    assert ENVIRONMENT.use_of(TASK, Flashcard(fact["question"], "x")) == CardUse((PLACES[place],), False)
    other = ENVIRONMENT.questions_beside(Flashcard(fact["question"], "x"), ())[0]
    meant = CardUse((PLACES[place],), False)  # it asks amiss for this fact
    assert ENVIRONMENT.use_of(TASK, Flashcard(other, fact["answer"])) == meant
    subject = subject_of(fact["plain_question"])
    assert subject is not None
    stranger = replace(subject, person="Zoe").wordings[0]
    assert ENVIRONMENT.use_of(TASK, Flashcard(stranger, fact["answer"])) == CardUse((), False)
    assert ENVIRONMENT.use_of(TASK, Flashcard("What is up?", fact["answer"])) == CardUse((), False)
    assert ENVIRONMENT.questions_told(TASK, f"So: {fact['sentence']} Yes.") == (PLACES[place],)
    assert ENVIRONMENT.questions_told(TASK, "Nothing.") == ()


def test_a_fact_that_nobody_asks_for_may_be_told_rightly() -> None:
    unasked = replace(TASK, payload={**TASK.payload, "questions": TASK.payload["questions"][:1]})
    fact = FACTS[PLACES.index(1)]
    assert ENVIRONMENT.use_of(unasked, Flashcard(fact["question"], fact["answer"])) == CardUse((), True)
