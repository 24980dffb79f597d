"""Multi-objective search: what a turn shows, how replies are read and scored, which questions make a task."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.environments.base import prepare
from actors.environments.build import build_environment
from actors.environments.search import SearchEnvironment, SearchSession, read_corpus, read_questions
from actors.protocols import TaskError
from actors.text.retrieval import Embedder, load_embedder
from actors.types import Outcome, Task
from configs.schema import EmbedderConfig, EnvironmentConfig, SearchConfig

DATA = Path(__file__).parents[1] / "data"
QUESTIONS, CORPUS = DATA / "search_questions.json", DATA / "search_corpus.json"


def _no_embedder() -> Embedder:
    raise AssertionError("searching by words needs no embedder")


def opened(embedder: Callable[[], Embedder] = _no_embedder, **settings: Any) -> SearchEnvironment:
    paths = {"questions_path": str(QUESTIONS), "corpus_path": str(CORPUS)}
    return SearchEnvironment(SearchConfig(**(paths | {"objectives": 2} | settings)), embedder)


def _session(*questions: int, **settings: Any) -> SearchSession:
    return opened(**settings).start(Task("t", "search", {"questions": list(questions)}, 0))


def _turn(session: SearchSession) -> str:
    observation = session.observe()
    assert observation is not None and observation.wants_action
    assert observation.tells  # the results of a search are news
    return observation.text


def _ended(session: SearchSession, *replies: str) -> Outcome:
    for reply in replies:
        _turn(session)
        session.act(reply)
    assert session.observe() is None
    return session.outcome()


def test_a_turn_says_what_is_asked_and_how_to_reply() -> None:
    session = _session(0, 3)
    assert session.question == (
        "In which town was the painter of Grey Harbour born?; How many arches does the bridge at Orsa have?"
    )
    assert _turn(session) == (
        f"Questions: {session.question}\n"
        "Turns left: 10. Reply with <search>...</search> or <answer>...; ...</answer> with 2 answers."
    )


def test_a_search_comes_back_with_passages_and_again_with_all_that_is_needed_to_go_on() -> None:
    session = _session(0, 3, results=2)
    session.act(
        "I look it up. <search>painter of Grey Harbour</search> and then <answer>too early; 1</answer>"
    )
    lines = _turn(session).splitlines()
    assert lines[0] == "Passages found for: painter of Grey Harbour"
    assert lines[1] == "[1] Grey Harbour: Grey Harbour is a painting by Ida Holm. It shows boats in winter."
    assert lines[2].startswith("[2] ") and lines[3:5] == ["", f"Questions: {session.question}"]
    assert lines[5].startswith("Turns left: 9. Reply with <search>")
    session.act("<search>zyzzyva</search>")
    assert _turn(session).startswith("No passage was found for: zyzzyva\n\nQuestions: ")


def test_the_last_turn_says_so_and_an_episode_without_an_answer_scores_0() -> None:
    session = _session(0, 3, max_turns=2)
    session.act("<search>Orsa</search>")
    assert (
        _turn(session).splitlines()[-1]
        == "Turns left: 1. This is the last turn: reply with <answer>...; ...</answer> with 2 answers."
    )
    outcome = _ended(session, "<search>Skagnes</search>")
    assert outcome.reward == 0 and [answer.prediction for answer in outcome.answers] == ["", ""]
    scores = {"f1": 0, "em": 0, "official_f1": 0, "official_em": 0}
    assert outcome.reward_parts == scores | {
        "count_mismatch": 0,
        "unanswered": 1,
        "searches": 2,
        "malformed": 0,
    }


@pytest.mark.parametrize(
    "reply",
    ["", "Skagnes; 7", "<search>Orsa", "<answer>Skagnes; 7", "<search> </search>", "<search>Orsa</answer>"],
)
def test_a_reply_in_neither_form_is_told_so_counted_and_takes_a_turn(reply: str) -> None:
    session = _session(0, 3, max_turns=3)
    session.act(reply)
    text = _turn(session)
    assert text.startswith(
        "Your last reply was neither a search nor an answer in the form that is asked for.\n\nQuestions: "
    )
    assert "Turns left: 2. Reply with <search>" in text
    outcome = _ended(session, "<answer>Skagnes; 7</answer>")
    assert outcome.reward == 1 and (outcome.reward_parts["malformed"], outcome.reward_parts["searches"]) == (
        1,
        0,
    )


@pytest.mark.parametrize(
    ("answer", "f1", "em"),
    [
        ("Skagnes; 7", [1, 1], [1, 1]),
        (" skagnes ;\n7. ", [1, 1], [1, 1]),
        ("the town of Skagnes; 7", [0.4, 1], [0, 1]),
        ("7; Skagnes", [0, 0], [0, 0]),  # positions count
        ("; 7", [0, 1], [0, 1]),
    ],
)
def test_the_score_is_the_mean_over_positions(answer: str, f1: list[float], em: list[float]) -> None:
    outcome = _ended(_session(0, 3), f"<answer>{answer}</answer>")
    assert [scored.scores["f1"] for scored in outcome.answers] == pytest.approx(f1)
    assert [scored.scores["em"] for scored in outcome.answers] == em
    assert (
        outcome.reward == outcome.reward_parts["f1"] == pytest.approx(sum(f1) / 2)
        and outcome.reward_parts["em"] == sum(em) / 2
    )
    assert [(scored.gold, scored.category) for scored in outcome.answers] == [
        (("Skagnes",), "bridge"),
        (("7",), "bridge"),
    ]


@pytest.mark.parametrize(
    ("replies", "f1", "em"),
    [
        (["<answer>Jay Z; New York</answer>"], [1, 1], [1, 0]),
        (["<answer>; the New York</answer>"], [0, 0.8], [0, 0]),
        (["<answer>?; New York, New York</answer>"], [0, 1], [0, 1]),
        (["<answer>Jay-Z</answer>"], [0, 0], [0, 0]),
        (
            ["<think>as <answer>x</answer></think><answer>Jay-Z; York</answer>"],
            [1, 2 / 3],
            [1, 0],
        ),  # the last one; Engram takes the first
        (
            ["<search>a</search><answer>Jay-Z; Rome</answer>", "<search>b</search>"],
            [1, 0],
            [1, 0],
        ),  # Engram takes the search
        (["<answer>Jay-Z", "<answer>Jay-Z; New York</answer>"], [0, 0], [0, 0]),  # one stays open
        (["</answer>Jay-Z; New York<answer>", "<search>b</search>"], [0, 0], [0, 0]),
    ],
)
def test_the_scores_of_mem1s_own_evaluation_stand_beside_the_plain_ones(
    tmp_path: Path, replies: list[str], f1: list[float], em: list[float]
) -> None:
    path = changed(
        tmp_path,
        lambda items: (items[0].update(answer="Jay-Z"), items[3].update(answer="New York, New York")),
    )
    outcome = _ended(_session(0, 3, questions_path=str(path), max_turns=len(replies)), *replies)
    assert [answer.scores["official_f1"] for answer in outcome.answers] == pytest.approx(f1)
    assert [answer.scores["official_em"] for answer in outcome.answers] == em
    means = outcome.reward_parts["official_f1"], outcome.reward_parts["official_em"]
    assert means == (pytest.approx(sum(f1) / 2), sum(em) / 2) and outcome.reward == outcome.reward_parts["f1"]


@pytest.mark.parametrize("answer", ["Skagnes", "Skagnes; 7; 7", "Skagnes; 7;", ""])
def test_another_number_of_answers_than_questions_scores_0(answer: str) -> None:
    outcome = _ended(_session(0, 3), f"<answer>{answer}</answer>")
    assert outcome.reward == 0 and (
        outcome.reward_parts["count_mismatch"],
        outcome.reward_parts["unanswered"],
    ) == (1, 0)
    assert [scored.prediction for scored in outcome.answers] == [answer, answer]


def test_one_question_is_a_task_too() -> None:
    session = _session(4, objectives=1)
    assert "Question: Are Ida Holm" in _turn(session) and "<answer>...</answer> with 1 answer." in _turn(
        session
    )
    assert _ended(session, "<answer>No</answer>").reward == 1


def test_a_semicolon_inside_a_question_or_a_gold_answer_does_no_harm(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda items: items[0].update(answer="Skagnes; Orsa"))
    session = _session(0, 7, questions_path=str(path))
    assert _ended(session, "<answer>Skagnes, Orsa; Skagnes Library</answer>").reward_parts["em"] == 1


def test_of_several_right_answers_the_best_match_counts(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda items: items[0].update(answer=["a town in the north", "Skagnes"]))
    outcome = _ended(_session(0, 3, questions_path=str(path)), "<answer>Skagnes; 7</answer>")
    assert outcome.reward == outcome.reward_parts["official_em"] == 1
    assert outcome.answers[0].gold == ("a town in the north", "Skagnes")


def test_tasks_are_consecutive_questions_of_one_side_and_the_sides_are_disjoint() -> None:
    environment = opened()
    evaluated = [task.payload["questions"] for task in environment.tasks("eval", 0, 0)]
    trained = [task.payload["questions"] for task in itertools.islice(environment.tasks("train", 0, 0), 4)]
    sides = [sorted(itertools.chain(*chunks)) for chunks in (evaluated, trained[:2])]
    assert len(evaluated) == 2 and not set(sides[0]) & set(sides[1])
    assert sorted(trained[:2]) == sorted(trained[2:])  # a pass is over all of them
    assert all(chunk == sorted(chunk) for chunk in evaluated + trained)


def test_a_question_keeps_its_side_when_the_file_is_reordered_or_read_as_lines(tmp_path: Path) -> None:
    items = json.loads(QUESTIONS.read_text())
    path = tmp_path / "questions.jsonl"
    lines = [
        {"id": item["_id"], "question": item["question"], "answer": [item["answer"], "nothing"]}
        for item in reversed(items)
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")

    def asked(environment: SearchEnvironment) -> set[str]:
        return {environment.start(task).question for task in environment.tasks("eval", 0, 0)}

    assert asked(opened(objectives=1)) == asked(opened(objectives=1, questions_path=str(path)))
    (first, *_) = read_questions(str(path))
    assert (first.key, first.answers, first.category) == ("s09", ("1968", "nothing"), "search")


def test_position_and_seed_alone_determine_a_task() -> None:
    everything = list(itertools.islice(opened().tasks("train", 3, 0), 12))
    assert list(itertools.islice(opened().tasks("train", 3, 5), 7)) == everything[5:]
    assert len({task.id for task in everything}) == 12


def test_search_by_meaning_finds_what_shares_no_word() -> None:
    config = EnvironmentConfig(
        name="search",
        search=SearchConfig(
            questions_path=str(QUESTIONS), corpus_path=str(CORPUS), objectives=1, results=1, retriever="dense"
        ),
    )
    environment = build_environment(config, EmbedderConfig())
    session = environment.start(Task("t", "search", {"questions": [8]}, 0))
    session.act("<search>trains and tracks</search>")
    observation = session.observe()
    assert observation is not None and "[1] Velde Line: " in observation.text
    # one for the whole process
    assert load_embedder(EmbedderConfig()) is environment._embedder  # type: ignore[attr-defined]


def test_a_corpus_is_embedded_by_prepare_and_by_no_episode() -> None:
    asked: list[int] = []

    class Counted:
        dimensions = 2

        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            asked.append(len(texts))
            return np.ones((len(texts), 2), np.float32)

    environment = opened(Counted, retriever="dense")
    task = next(environment.tasks("eval", 0, 0))
    assert asked == []
    prepare(environment)
    assert asked == [len(read_corpus(str(CORPUS)))]
    environment.start(task)
    assert len(asked) == 1


def test_a_task_from_another_file_is_refused() -> None:
    for questions in ([9], [], ["s01"]):
        with pytest.raises(TaskError, match="must be places in the 9 questions of"):
            opened().start(Task("t", "search", {"questions": questions}, 0))


def test_real_questions(hotpotqa_path: Path) -> None:
    paths = {
        "questions_path": str(hotpotqa_path / "questions.json"),
        "corpus_path": str(hotpotqa_path / "corpus.json"),
    }
    environment = opened(**paths, objectives=4)
    tasks = list(environment.tasks("eval", 0, 0))
    assert len(tasks) > 10
    gold = {
        item["question"].strip(): {title for title, _ in item["supporting_facts"]}
        for item in json.loads(Path(paths["questions_path"]).read_text())
    }
    found = wanted = 0
    for task in tasks:
        session = environment.start(task)
        for question in session._questions:
            session.act(f"<search>{question.text}</search>")
            shown = set(re.findall(r"^\[\d\] (.+?): ", _turn(session), flags=re.MULTILINE))
            found, wanted = found + len(gold[question.text] & shown), wanted + len(gold[question.text])
        session.act(f"<answer>{'; '.join(question.answers[0] for question in session._questions)}</answer>")
        assert session.outcome().reward_parts["em"] == 1
    # asking the index the question itself finds most of the passages that answer it
    assert found / wanted > 0.5


def changed(tmp_path: Path, change: Callable[[Any], object]) -> Path:
    items = copy.deepcopy(json.loads(QUESTIONS.read_text()))
    change(items)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(items))
    return path
