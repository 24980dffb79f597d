"""Signs of a collapsed memory: constant answers, repeated and unreadable cards; and the plot of the rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from actors.types import Answer, WriteOutcome, WriteRecord
from cluster.measure.collapse import (
    HEADER,
    ExtractionCounts,
    Extractions,
    collapse_cells,
    collapse_figures,
    constancy,
    count_extractions,
    total,
)
from cluster.measure.report import save_rows_plot
from cluster.measure.rows import TaskResult, failed_as_zero, load_row, save_row
from cluster.measure.statistics import Interval
from tests.unit.cluster_cases import group, task_at
from tests.unit.test_tables import row

APRIL = '[{"instruction": "When is Elena\'s birthday?", "output": "April 10"}]'
APRIL_AGAIN = APRIL.lower().replace("birthday?", "birthday")[:-1] + ', {"question": "A?", "answer": "B"}]'
MAY = '[{"instruction": "When is Elena\'s birthday?", "output": "May 2"}]'
BROKEN = "Elena was born on April 10."


def answer(prediction: str, gold: str) -> Answer:
    return Answer("When?", (gold,), prediction, "birthday", {"f1": 0.0})


def record(text: str, revision: int, outcome: WriteOutcome = "accepted") -> WriteRecord:
    return WriteRecord(revision, (), (), text, 0, 0, 0, 1.0, 0.5, 5, 0.1, outcome, "")


# --- constant answers -------------------------------------------------------------------------------------


def test_answers_are_the_same_by_their_words() -> None:
    found = constancy(
        [
            answer("April 7", "April 7"),
            answer("april  7.", "May 2"),
            answer("", "May 2"),
            answer("in Lisbon", "Lisbon"),
        ]
    )
    assert (found.most_frequent, found.share, found.gold) == ("april 7", 0.5, 0.5)


def test_an_empty_answer_is_an_answer() -> None:
    found = constancy([answer("", "a"), answer("!", "b"), answer("c", "c")])
    assert (found.most_frequent, found.share) == ("", pytest.approx(2 / 3))


def test_without_an_answer_nothing_is_claimed() -> None:
    assert math.isnan(constancy([]).share)
    assert collapse_cells([], None) == ("-",) * len(HEADER)
    assert collapse_figures([], None) == {}


# --- extractions ------------------------------------------------------------------------------------------


def test_a_later_card_with_question_and_answer_of_an_earlier_one_is_a_repeat() -> None:
    counts = count_extractions([record(APRIL, 1), record(APRIL_AGAIN, 2), record(MAY, 3)])
    assert counts.without_delta == Extractions(1, 0, 0)
    assert counts.under_delta == Extractions(2, 0, 1)  # another answer is news


def test_an_extraction_is_under_delta_from_the_first_accepted_write_on() -> None:
    counts = count_extractions(
        [
            record(BROKEN, 0, "empty"),
            record(APRIL, 0, "rolled_back"),
            record(
                APRIL.replace('"instruction"', "'instruction'"), 1
            ),  # sampled under revision 0; it repeats what was rolled back
            record("[]", 1, "empty"),  # readable: there was nothing to save
            record("", 1, "empty"),
        ]
    )
    assert counts.without_delta == Extractions(3, 1, 1, 1)  # the last is nearly JSON
    assert counts.under_delta == Extractions(2, 1, 0)


def test_counts_add_up_and_stay_unknown_without_any() -> None:
    one = count_extractions([record(APRIL, 1), record(BROKEN, 1, "empty")])
    both = total([one, None, one])
    assert both == ExtractionCounts(Extractions(2, 0, 0), Extractions(2, 2, 0))
    assert total([None]) is None
    answers = [answer("a", "a"), answer("a", "b")]
    assert collapse_cells(answers, both) == ("100.0 (50.0)", "2 / 2", "0.0 / 100.0", "0.0 / 0.0", "0.0 / 0.0")
    assert collapse_figures(answers, both) == {
        "constant_answers": 1.0,
        "constant_gold": 0.5,
        "unparsed_extractions": 0.0,
        "repeated_extractions": 0.0,
        "repaired_extractions": 0.0,
        "unparsed_extractions_under_delta": 1.0,
        "repeated_extractions_under_delta": 0.0,
        "repaired_extractions_under_delta": 0.0,
    }


def test_only_a_memory_of_flashcards_is_counted() -> None:
    played = group(task_at(0), 0, rewards=[0.5])
    (without,), (counted,) = (TaskResult.of(0, played, cards).episodes for cards in (False, True))
    assert without.extractions is None
    assert counted.extractions == ExtractionCounts()  # it wrote nothing


def test_a_row_of_an_older_version_has_no_counts(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    save_row(row("TMEM", [0.5]), path)
    path.write_text(path.read_text().replace(',\n   "extractions": null', ""))
    assert "extractions" not in path.read_text()
    assert load_row(path).extractions is None


# --- failed episodes --------------------------------------------------------------------------------------


def test_failed_episodes_as_zeros() -> None:
    assert failed_as_zero(0.8, 3, 1) == pytest.approx(0.6)
    assert failed_as_zero(math.nan, 0, 2) == 0.0
    assert math.isnan(failed_as_zero(math.nan, 0, 0))


# --- the plot ---------------------------------------------------------------------------------------------


def test_each_row_has_its_place_and_each_score_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    nothing = Interval(math.nan, math.nan, math.nan, 0)
    rows = {
        "memory off": {"f1": Interval(0.0, 0.0, 0.1, 8), "em": nothing},
        "TMEM after RL": {"f1": Interval(0.5, 0.3, 0.7, 8), "em": Interval(0.25, 0.1, 0.6, 8)},
    }
    save_rows_plot(rows, tmp_path / "rows.png", "recall")
    (axes,) = drawn[0].axes
    assert [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()] == list(rows)
    f1, em = axes.containers
    assert f1.lines[0].get_ydata().tolist() == [0.0, 50.0] and em.lines[0].get_ydata().tolist() == [25.0]
    assert [round(x) for x in f1.lines[0].get_xdata()] == [0, 1] and round(em.lines[0].get_xdata()[0]) == 1
    low, high = f1.lines[1]
    assert low.get_ydata().tolist() == pytest.approx([0.0, 30.0])
    assert high.get_ydata().tolist() == pytest.approx([10.0, 70.0])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["f1", "em"]
