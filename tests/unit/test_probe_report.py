"""What a probe's report may claim: cards of one write are not independent, nor are repeated cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli import main
from cluster.probe.grid import load_grid
from cluster.probe.report import ProbeReport, figures
from cluster.probe.values import Asked, Card, CardScore, CellRun, LeakScore, Point, WriteLine
from configs.load import ConfigError

QUICKSTART = Path("tests/quickstart.yaml")


def asked(em: float) -> Asked:
    return Asked(0.1, em, em, "")


def run(label: str, seed: int, recalled: list[float], paraphrased: bool = True) -> CellRun:
    """One write of a card for each number: its EM, and that of its one paraphrase."""
    cards = tuple(
        CardScore(place, 1, 1, asked(em), (asked(em),) if paraphrased else ())
        for place, em in enumerate(recalled)
    )
    line = WriteLine("accepted", "", 1, 1.0, 1.0, 0.1)
    return CellRun(
        (label,), label, seed, "basis", 1, (line,), (Point(0, 0, cards, ()), Point(1, 1, cards, ())), ()
    )


def cards(seed: object, count: int) -> tuple[Card, ...]:
    return tuple(Card(f"{seed}: {number}?", "yes", ()) for number in range(count))


def span(text: str) -> tuple[float, float, float]:
    mean, _, rest = text.partition(" [")
    low, _, high = rest.rstrip("]").partition(", ")
    return float(mean), float(low), float(high)


def test_a_gain_of_one_write_of_three_is_not_shown_as_that_of_twelve_cards() -> None:
    runs = [run("old", seed, [0.0] * 12) for seed in range(3)] + [
        run("new", seed, [float(seed == 2)] * 12) for seed in range(3)
    ]
    report = ProbeReport(tuple(runs), {seed: cards(seed, 12) for seed in range(3)}, {}, 500, 0)
    quality, versus = report.tables()
    assert span(quality.rows[1][3]) == (33, 0, 100)
    assert span(versus.rows[0][2]) == (33, 0, 100)
    assert versus.rows[0][3] == "+0, +0, +100"


def test_cards_of_a_file_count_once_however_many_seeds_ask_them() -> None:
    half = [1.0] * 6 + [0.0] * 6
    same = cards("file", 12)
    backwards = {0: same, 1: same[::-1], 2: same}
    runs = [run("as configured", seed, half[::-1] if seed == 1 else half) for seed in range(3)]
    once = ProbeReport((runs[0],), {0: same}, {}, 500, 0).tables()[0].rows[0][3]
    thrice = ProbeReport(tuple(runs), backwards, {}, 500, 0).tables()[0].rows[0][3]
    assert once == thrice and span(once)[2] - span(once)[1] > 40


def test_cards_without_paraphrases_are_compared_by_their_own_questions() -> None:
    runs = (run("old", 0, [0.0, 0.0], paraphrased=False), run("new", 0, [1.0, 0.0], paraphrased=False))
    _, versus = ProbeReport(runs, {0: cards(0, 2)}, {}, 200, 0).tables()
    assert versus.rows[0][2:4] == ("-", "+50")


def test_two_cells_of_the_same_settings_are_refused() -> None:
    said = "the cells 'learning_rate=5e-4' and 'learning_rate=0.0005' are the same settings.*leave one out"
    with pytest.raises(ConfigError, match=said):
        load_grid(QUICKSTART, [], [], ["write.learning_rate=5e-4,0.0005"])


def test_a_resumed_cell_is_called_what_it_is_asked_for_as_now(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base's own setting, later swept over by name: one cell on both seeds, not half of two."""
    common = [
        "probe",
        str(QUICKSTART),
        f"model.name={tiny_model_path}",
        f"output_dir={tmp_path}",
        "fast_weights.last_layers=2",
        "write.epochs=1",
    ]
    common += [
        "rollout.threads=1",
        "tracking.enabled=false",
        "--cards",
        "recall:2",
        "--unrelated",
        "tests/data/probe_cards.jsonl",
    ]
    assert main([*common, "--seeds", "0"]) == 0
    (folder,) = tmp_path.glob("quickstart-probe-*")
    assert main([*common, "--seeds", "0,1", "--sweep", "write.epochs=1,2", "--resume", str(folder)]) == 0
    assert "1 of 4 cells are done already" in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    assert "as configured" not in text and "epochs=2, against each other cell" in text


def test_the_leak_is_a_column_of_its_own_and_what_was_not_asked_is_no_zero() -> None:
    line = WriteLine("accepted", "", 1, 1.0, 1.0, 0.1, cpu_s=2.0)

    def point(write: int, leaked: list[float]) -> Point:
        strangers = [LeakScore("stranger", f"{place}?", "Oslo", leak) for place, leak in enumerate(leaked)]
        own = LeakScore("other_card", "file: 0?", "Oslo", 1.0)
        return Point(write, 0, (CardScore(0, 1, 1, asked(1.0), ()),), (), (*strangers, own))

    def cell(label: str, after: list[float]) -> CellRun:
        points = (point(0, [0.0, 0.0, 0.0, 1.0]), point(1, after))
        return CellRun((label,), label, 0, "basis", 1, (line,), points, ())

    runs = (cell("old", [1.0, 1.0, 1.0, 0.0]), cell("new", [0.0, 0.0, 0.0, 0.0]))
    report = ProbeReport(runs, {0: cards("file", 1)}, {}, 200, 0)
    quality, versus = report.tables()
    shown = dict(zip(quality.header, quality.rows[0], strict=True))
    assert span(shown["strangers %"])[0] == 75 and span(shown["other cards %"])[0] == 100
    assert shown["same person %"] == "-" and shown["CPU s/write"] == "2.0"
    assert span(dict(zip(versus.header, versus.rows[0], strict=True))["strangers, points"])[0] == -75
    assert "the untouched model: 25, -, 100 %" in report.notes()[0]
    assert figures(runs[0].after[1])["leak_stranger"] == 0.75
