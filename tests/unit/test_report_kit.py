"""The report kit: documents, tables, intervals in words, and plots."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from cluster.common.display import Display
from cluster.measure.report import (
    Curve,
    Document,
    Panel,
    Section,
    Table,
    interval_text,
    markdown,
    running_mean,
    save_document,
    save_plot,
    show,
)
from cluster.measure.statistics import PairedDifference, mean_interval

DOCUMENT = Document(
    "Speed",
    {"machine": "two cores"},
    (
        Section(
            "writer",
            "One against the other.",
            (
                Table("", ("case", "s [95 %]"), (("[red]|b", "1 [0, 2]"),), "s: seconds"),
                Table("Memory", ("rows", "MiB"), (("8", "12"),), "s: seconds"),
                Table("All rows", ("rows",), (("1",),), "never said", detail=True),
            ),
            ("measured twice",),
            (Path("writer.png"),),
        ),
        Section("Problems"),
        Section("", tables=(Table("End", ("x",), ()),)),
    ),
)


MARKDOWN = r"""# Speed

- machine: two cores

## writer

One against the other.

| case | s [95 %] |
| --- | --- |
| [red]\|b | 1 [0, 2] |

s: seconds

### Memory

| rows | MiB |
| --- | --- |
| 8 | 12 |

s: seconds

### All rows

| rows |
| --- |
| 1 |

never said

- measured twice

![writer](writer.png)

## End

| x |
| --- |
"""


def test_a_document_as_markdown() -> None:
    assert markdown(DOCUMENT) == MARKDOWN


def test_a_document_on_the_terminal() -> None:
    """Titles with their section, brackets as they are, each legend once, no details, no facts."""
    file = io.StringIO()
    show(DOCUMENT, Display(Console(file=file, width=80)))
    text = file.getvalue()
    lines = [line.strip() for line in text.splitlines()]
    assert "writer" in lines and "writer: Memory" in lines and "End" in lines
    assert "[red]|b" in text and "1 [0, 2]" in text and "s [95 %]" in text
    assert text.count("s: seconds") == 1
    assert text.index("12") < text.index("s: seconds") < text.index("measured twice")
    for hidden in ("All rows", "never said", "two cores", "Problems"):
        assert hidden not in text
    untitled = Document("Alone", {}, (Section("", tables=(Table("", ("x",), ()),)),))
    show(untitled, Display(Console(file=file, width=80)))
    assert "Alone" in file.getvalue()


@pytest.mark.parametrize("width", [80, 40, 160])
def test_no_terminal_is_too_narrow_for_a_cell(width: int) -> None:
    """A table that does not fit is a block for each row. Prose alone is divided, between its words."""
    header = ("row", "tasks", "failed", "F1 [95 %]", "EM [95 %]", "official [95 %]", "reward", "said")
    figures = ("16", "0", "82.3 [69.7, 91.2]", "50.1 [40.2, 60.3]", "12.5 [1.4, 20.6]", "+0.123")
    rows = (("before", *figures, "page in 3, " * 6), ("epochs=5 basis=svd", *figures, ""))
    file = io.StringIO()
    scores = Table("Scores", header, rows)
    show(Document("x", {}, (Section("", tables=(scores,)),)), Display(Console(file=file, width=width)))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for cell in {cell for row in rows for cell in row[:-1]}:
        assert cell in text, text
    assert text.count("page") == 6 and all(word in text for name in header[1:] for word in name.split())
    assert ("─" in text) == (width == 160)


def test_the_files_of_a_document_hold_no_nan(tmp_path: Path) -> None:
    lines = [{"case": "a, b", "value": 0.5}, {"case": "c", "value": math.nan}]
    paths = save_document(DOCUMENT, tmp_path / "new", {"lines": lines}, lines, name="pool")
    assert [path.name for path in paths] == ["pool.md", "pool.csv", "pool.json"]
    assert paths[0].read_text() == MARKDOWN
    assert paths[1].read_text() == 'case,value\n"a, b",0.5\nc,\n'
    data = json.loads(paths[2].read_text(), parse_constant=pytest.fail)
    assert data == {"lines": [{"case": "a, b", "value": 0.5}, {"case": "c", "value": None}]}
    assert [path.name for path in save_document(DOCUMENT, tmp_path, {})] == ["report.md", "report.json"]


def test_intervals_in_words() -> None:
    assert interval_text(mean_interval([1.0] * 8)) == "100.0 [63.1, 100.0]"
    change = PairedDifference(0.105, -0.0025, 0.2, 0.04, 9)
    assert interval_text(change, sign="+") == "+10.5 [-0.2, +20.0]"
    assert interval_text(change, digits=0) == "10 [-0, 20]"
    assert interval_text(mean_interval([])) == "-"
    of_two_seeds = PairedDifference(0.105, math.nan, math.nan, math.nan, 2)
    assert interval_text(of_two_seeds, sign="+") == "+10.5"


def test_the_running_mean_begins_with_the_values_there_are() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([]) == []


@pytest.mark.parametrize("series", [1, 13])
def test_a_plot_has_a_legend_of_each_series_and_whole_steps(
    series: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    curves = []
    for number in range(series):
        curves.append(Curve([0, 1, 2], [0.1, 0.2, 0.3], number, f"row {number}", "dots", [(0.0, 0.15)] * 3))
        curves.append(Curve([0, 1, 2], [0.3, 0.3, 0.3], number, style="thin"))
    save_plot(
        [Panel("step", "F1", tuple(curves), steps=True), Panel("s", "F1", (), "cost", log_x=True)], tmp_path
    )
    (figure,) = drawn
    first, second = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"row {n}" for n in range(series)]
    assert all(float(tick).is_integer() for tick in first.get_xticks())
    lines = [line for line in first.get_lines() if len(line.get_xdata()) == 3 and line.get_linestyle() == "-"]
    colours = [line.get_color() for line in lines]
    assert len(set(colours)) == series
    assert second.get_xscale() == "log" and second.get_title() == "cost"
