"""Right flashcards and what became of them, by step and in the tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.episodes.group_summary import EpisodeSummary
from actors.types import Answer, CardUse, Flashcard, Outcome, Task, Timings, Trajectory, WriteRecord
from cluster.measure.card_counts import CardCounts, cards_table, count_cards, total_cards
from cluster.measure.row_metrics import row_metrics
from cluster.measure.rows import RowResult, load_row, save_row, score_episode
from cluster.train.metrics import card_metrics
from cluster.train.report import training_report

CARD = Flashcard("q", "a")


def record(*uses: CardUse, cards: int | None = None, outcome: Any = "accepted") -> WriteRecord:
    written = (CARD,) * (len(uses) if cards is None else cards)
    return WriteRecord(1, (), written, "", 0, 0, 0, 2.0, 1.0, 5, 0.1, outcome, "", uses=uses)


def answer(em: float, category: str = "home", **kinds: float) -> Answer:
    scores = {"f1": em, "em": em, "told_elsewhere": 0.0, "abstained": 0.0, **kinds}
    return Answer("q", ("a",), "", category, scores)


WRITES = (
    record(CardUse((0,), True), CardUse((0,), True), CardUse((2,), True)),  # two wordings of one fact
    record(CardUse((1,), False), CardUse((), True)),
    record(CardUse((1,), True), outcome="rolled_back"),  # not in the weights
)
ANSWERS = (answer(1.0), answer(0.0, told_elsewhere=1.0), answer(0.0), answer(1.0, "stranger", abstained=1.0))


def test_counts_are_of_accepted_writes_and_of_told_questions() -> None:
    counts = count_cards(WRITES, ANSWERS)
    assert counts == CardCounts(cards=5, right=4, questions=3, covered=2, answered=1)
    assert counts is not None and counts.shares == {
        "right_cards": 0.8,
        "questions_with_a_right_card": pytest.approx(2 / 3),
        "right_answers_of_right_cards": 0.5,
    }
    assert counts + counts == CardCounts(10, 8, 6, 4, 2)


def test_where_the_environment_cannot_say_nothing_is_counted() -> None:
    assert count_cards([record(cards=2)], ANSWERS) is None
    silent = count_cards([], ANSWERS)
    assert silent == CardCounts(questions=3) and silent.shares == {"questions_with_a_right_card": 0.0}
    assert total_cards([silent, silent]) is None, "no card was written at all"
    some = CardCounts(1, 1, 3, 1, 0)
    assert total_cards([silent, some]) == CardCounts(1, 1, 6, 1, 0)
    assert total_cards([some, None]) is None


def trajectory(writes: tuple[WriteRecord, ...] = WRITES) -> Trajectory:
    task, outcome = Task("t", "recall", {}, 0), Outcome(0.5, {}, ANSWERS)
    return Trajectory(task, "g.0", 0, (), (), writes, {}, outcome, "done", Timings(1, 0, 0, 0, 0, 0))


def test_a_step_shows_the_shares_of_its_episodes() -> None:
    summary = EpisodeSummary.of(trajectory())
    figures = card_metrics([summary, summary])
    assert figures["cards/right_cards"] == 0.8 and len(figures) == 3
    assert card_metrics([EpisodeSummary.of(trajectory((record(cards=1),)))]) == {}


def test_a_row_keeps_them_and_the_report_shows_them(tmp_path: Any) -> None:
    scored = score_episode(trajectory(), writes_cards=True)
    row = RowResult("TMEM after RL", 3, (scored, scored), ())
    save_row(row, tmp_path / "row.json")
    assert load_row(tmp_path / "row.json") == row
    assert row_metrics(row, "after_rl")["eval/after_rl/right_answers_of_right_cards"] == 0.5
    off = replace(row, label="memory off", episodes=(score_episode(trajectory(())),))
    report = training_report({"memory_off": off, "after_rl": row}, (), 0.0)
    (table,) = [table for table in report.document().sections[0].tables if table.title == "Right flashcards"]
    assert table.rows == (("TMEM after RL", "10", "80.0", "66.7", "50.0"),)
    assert report.data()["rows"][1]["right_cards"] == 0.8 and "right_cards" not in report.data()["rows"][0]
    assert not cards_table({"memory off": off.cards}).rows
