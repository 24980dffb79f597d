"""A probe's study files: the shipped ones are grids that load, and a mistake in a user's file is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli import main
from cluster.probe.grid import Study, load_grid, load_study
from cluster.probe.values import ProbeError
from configs.shipped import shipped

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("name", shipped("studies"))
def test_a_shipped_study_is_a_grid_over_the_quickstart(name: str) -> None:
    study = load_study(name)
    _, cells = load_grid(QUICKSTART, study.settings, study.cells, study.sweep)
    for cell in cells:  # the quickstart preserves, and a study's cell only where study or cell says so
        said = [setting for setting in (*study.settings, *cell.settings) if "preserve.weight=" in setting]
        assert cell.write.preserve.weight == float(said[-1].partition("=")[2] if said else 0)
    assert len(cells) >= max(2, len(study.cells))
    assert study.cards.startswith("recall:")
    assert study.cards.startswith("recall:train:") == name.endswith("tuning"), (
        "nothing is tuned on what it is then measured on"
    )


def test_a_file_gives_what_the_command_line_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    grid = "cells:\n  - write.epochs=2 write.learning_rate=1e-3\nsweep:\n  - write.rehearsal=0,4\n"
    path.write_text(f"cards: cards.jsonl\nseeds: [3, 4]\nwrites: 2\neach_step: true\n{grid}")
    cells = (("write.epochs=2", "write.learning_rate=1e-3"),)
    assert load_study(str(path)) == Study("cards.jsonl", (3, 4), 2, True, cells, ("write.rehearsal=0,4",))
    path.write_text("cards: recall:4\n")
    assert load_study(str(path)) == Study(cards="recall:4")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a list", "Input should be an object; its keys are cards, seeds, writes"),
        ("card: x", "card: Unexpected"),
        ("writes: 0", "writes: Input should be greater than 0"),
        ("writes: true", "writes: Input should be a valid integer"),
        ("cards: 5", "cards: Input should be a valid string"),
        ("seeds: [a]", "seeds.0: Input should be a valid integer"),
        ("seeds: [0, 0, 1]", "seeds: Input should have each seed once"),
        ("seeds: [2, -1]", "seeds.1: Input should be greater than or equal to 0"),
        ("seeds: [2024-13-01]", r"seeds.0: Input should be a valid integer"),
        (f"seeds: {'[' * 3000}", r"is not YAML that can be read \(maximum recursion"),
        ("cells: write.epochs=2", "cells: Input should be a valid array"),
        ("cells: [2]", "cells.0: Input should be a text of key=value settings"),
        ("cards: [", "is not YAML"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ProbeError, match=part) as caught:
        load_study(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("seeds", ["0,0,1", "0,00", "1,2,01", "-1", "0,", "x"])
def test_a_seed_is_given_once_whatever_its_digits(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", str(QUICKSTART), "--study", "write", f"--seeds={seeds}", "--print-config"]
    assert main(words) == 2
    assert f"'{seeds}' is not allowed: give whole numbers" in capsys.readouterr().err


def test_a_study_that_does_not_exist_is_one_line_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["probe", str(QUICKSTART), "--study", "nope"]) == 2
    assert "--study nope: no such file; shipped are" in capsys.readouterr().err
