"""What an evaluation shows: pooled seeds, paired differences, adjusted p-values, costs, and the files."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.evaluation.report import ComparisonReport, context_lines, save_comparison, save_plots
from cluster.evaluation.summary import RowSummary, compare_rows, summarize
from cluster.measure.collapse import ExtractionCounts, Extractions
from cluster.measure.report import markdown
from cluster.measure.rows import EpisodeScore
from tests.unit.comparison_cases import MODEL, plan, result, scored

ONE = ExtractionCounts(without_delta=Extractions(1, 0, 0))
GOLDEN = """\
# Evaluation

- policy: the base model

## recall

### Scores

| row | tasks | failed | F1 % [95% CI] | EM % [95% CI] | official_f1 % [95% CI] | count_mismatch | \
F1 against truncation | p | Holm p |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| truncation | 4 | 1 | 0.0 [0.0, 60.2] | 0.0 [0.0, 60.2] | 0.0 [0.0, 60.2] | 0.500 | - | - | - |
| tmem | 4 | 0 | 50.0 [27.2, 72.8] | 0.0 [0.0, 60.2] | 25.0 [6.4, 54.5] | - | \
+50.0 [-9.1, +87.1] | 0.1055 | 0.2110 |
| hybrid | 2 (1 of 2 cells missing) | 0 | 0.0 [0.0, 84.2] | 0.0 [0.0, 84.2] | 0.0 [0.0, 84.2] | - | \
+0.0 [-76.4, +76.4] | 1.0000 | 1.0000 |

tasks: finished episodes. failed: episodes that did not finish; they are in no mean. \
Intervals: 95 %, over different questions, seeds pooled (Korn and Graubard's; Clopper and Pearson's for \
scores of 0 or 1). p: the same test, paired with the baseline; below 0.05 where the interval leaves 0 out. \
Holm p: adjusted for all 2 comparison(s) of this report.

### F1 % by category (tasks)

| row | adversarial (2) | work (2) | all but adversarial (2) |
| --- | --- | --- | --- |
| truncation | 0.0 | 0.0 | 0.0 |
| tmem | 50.0 | 50.0 | 50.0 |
| hybrid | 0.0 | 0.0 | 0.0 |
"""


def rows() -> tuple[RowSummary, ...]:
    planned = plan("truncation", "tmem", "hybrid")
    cells = {cell.key: cell for cell in planned.cells}
    found = {}
    for key, cell in cells.items():
        label, seed = cell.variant.label, cell.config.seed
        f1 = 0.5 if label == "tmem" else 0.0
        parts = {"count_mismatch": float(seed), "judge_usd": 0.25} if label == "truncation" else {}
        episodes = [
            scored(f"t{n}", f"s{seed}t{n}", f1, ("work", "adversarial")[n], context=60 + 10 * seed, **parts)
            for n in range(2)
        ]
        if label == "tmem":
            one = ExtractionCounts(without_delta=Extractions(1, int(seed == 1), 0))
            episodes = [replace(episodes[0], extractions=one), replace(episodes[1], extractions=ONE)]
        failed = ("engine: out of memory",) if label == "truncation" and seed == 1 else ()
        if (label, seed) != ("hybrid", 1):
            found[key] = result(label, episodes, failed)
    return summarize(planned.cells, found, {"recall--hybrid--seed1": "worker-0 died during task t1"})


def report() -> ComparisonReport:
    summaries = rows()
    differences = compare_rows(summaries, (("tmem", "truncation"), ("hybrid", "truncation")))
    return ComparisonReport(
        {"policy": "the base model"},
        summaries,
        tuple(row.cost(MODEL, 4) for row in summaries),
        differences,
    )


def test_markdown_is_as_it_should_be() -> None:
    text = markdown(report().document({"recall": [Path("recall-cost-tokens.png")]}))
    assert text.startswith(GOLDEN)
    cost = text[text.index("### Cost") :]
    assert "| truncation | 100+20 | 1.5 | 70 | 0.0 | 512 | - | 4/0/0 | usd 1 |" in cost
    assert "| tmem | malformed 4 |" in cost
    assert "![recall-cost-tokens](recall-cost-tokens.png)" in cost
    gain = "F1 +50.0 [-9.1, +87.1] points on 4 questions, p = 0.1055, adjusted p = 0.2110: NOT significant."
    nothing = (
        "F1 +0.0 [-76.4, +76.4] points on 2 questions, p = 1.0000, adjusted p = 1.0000: NOT significant."
    )
    assert f"- recall: tmem against truncation: {gain}" in cost
    assert f"- recall: hybrid against truncation: {nothing}" in cost
    assert "- recall, truncation: 1 episode(s) failed and are left out: engine: out of memory" in cost
    counted = "with all 1 failed episodes counted as 0, F1 would be 0.0 %"
    assert f"- recall, truncation: {counted}" in cost
    collapse = text[text.index("### Answers and flashcards") : text.index("### Cost")]
    assert "| tmem | 100.0 (100.0) | 4 / 0 | 25.0 / - | 0.0 / - |" in collapse  # one answer, one right answer
    assert "| truncation | 100.0 (100.0) | - | - | - |" in collapse  # it writes no flashcards
    assert "- recall, hybrid: NOT MEASURED, seed 1: worker-0 died during task t1" in cost


def one_seed(label: str, episodes: list[EpisodeScore], seed: int = 0) -> RowSummary:
    return RowSummary("b", label, 1, ((seed, result(label, episodes)),), ())


def test_a_question_that_a_seed_repeats_is_no_new_evidence() -> None:
    """The same four questions under five seeds: the interval is that of four questions, not of twenty."""
    values = (0.0, 0.0, 1.0, 1.0)
    once = one_seed("r", [scored(f"t{n}", f"q{n}", value) for n, value in enumerate(values)])
    again = [
        (seed, result("r", [scored(f"t{seed}-{n}", f"q{n}", value) for n, value in enumerate(values)]))
        for seed in range(5)
    ]
    pooled = RowSummary("b", "r", 1, tuple(again), ())
    assert pooled.interval("f1") == once.interval("f1")
    assert (pooled.items, len(pooled.episodes)) == (4, 20)


def test_pairs_share_seed_and_task() -> None:
    """The rows' means are equal; only pairs of one seed and task show that each of them lost or won."""
    first = one_seed("one", [scored("t0", "a", 0.0), scored("t1", "b", 1.0)])
    episodes = [scored("t1", "b", 0.4), scored("t0", "a", 0.6), scored("t9", "c", 1.0)]
    (compared,) = compare_rows((first, one_seed("two", episodes)), (("two", "one"),))
    assert compared.difference.count == 2
    assert compared.difference.mean == pytest.approx(0.0)
    other_seed = one_seed("two", episodes, seed=1)
    (nothing,) = compare_rows((first, other_seed), (("two", "one"),))
    assert nothing.difference.count == 0


def test_a_difference_is_the_row_minus_its_baseline() -> None:
    low, high = one_seed("low", [scored("t0", "a", 0.25)]), one_seed("high", [scored("t0", "a", 0.75)])
    (compared,) = compare_rows((low, high), (("high", "low"),))
    assert (compared.label, compared.baseline, compared.difference.mean) == ("high", "low", 0.5)


def test_costs_are_means_peaks_and_sums() -> None:
    peaks = (
        (0, result("r", [scored("t0", "a", 0.0, tokens=100, context=50)])),
        (1, result("r", [scored("t0", "b", 0.0, tokens=300, context=80)], (), None)),
    )
    cost = RowSummary("b", "r", 1, peaks, ()).cost(MODEL, 4)
    assert (cost.prompt_tokens, cost.peak_context, cost.writes["accepted"], cost.events) == (
        200,
        80,
        2,
        {"malformed": 2},
    )
    # keys and values, layers, key-value heads, their size, bytes, tokens
    assert cost.kv_bytes == 2 * 2 * 1 * 32 * 4 * 80
    assert cost.resident_bytes is None  # one of the two is unknown: so is the worst


def test_files_hold_every_figure(tmp_path: Path) -> None:
    made = report()
    paths = {path.name: path for path in save_comparison(made, tmp_path)}
    with paths["report.csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert {line["row"] for line in lines} == {"truncation", "tmem", "hybrid"}
    by_place = {(line["row"], line["measure"], line["category"]): line for line in lines}
    assert float(by_place["tmem", "f1", ""]["value"]) == 0.5
    assert float(by_place["tmem", "official_f1", "all but adversarial"]["value"]) == 0.25
    assert float(by_place["truncation", "judge_usd", ""]["value"]) == 1.0
    assert float(by_place["tmem", "event_malformed", ""]["value"]) == 4.0
    data = json.loads(paths["report.json"].read_text(), parse_constant=pytest.fail)
    assert [comparison["row"] for comparison in data["comparisons"]] == ["tmem", "hybrid"]
    assert len(data["figures"]) == len(lines)
    metrics = made.metrics()
    assert metrics["eval/recall/tmem/f1"] == 0.5
    assert metrics["eval/recall/truncation/failed_episodes"] == 1.0
    assert metrics["eval/recall/tmem/constant_answers"] == 1.0
    assert metrics["eval/recall/tmem/unparsed_extractions"] == 0.25
    assert "eval/recall/tmem/unparsed_extractions_under_delta" not in metrics  # there was none
    assert all(re.fullmatch(r"[A-Za-z0-9_\-. /]+", key) for key in metrics)  # what MLflow allows


def test_plots_are_drawn_against_cost_and_against_l_max(tmp_path: Path) -> None:
    planned = plan("truncation", seeds=(0,), sweep=("memory.max_context_tokens=100,54",))
    found = {
        cell.key: result(cell.variant.label, [scored("t0", "a", 0.5), scored("t1", "b", 0.1)])
        for cell in planned.cells
    }
    swept = summarize(planned.cells, found, {})
    lines = context_lines(swept)
    assert {name: [row.max_context_tokens for row in line] for name, line in lines.items()} == {
        "truncation": [54, 100]
    }
    pairs = [(row, row.cost(MODEL, 4)) for row in swept]
    plots = save_plots(pairs, tmp_path)
    assert [plot.name for plot in plots] == [
        "recall-rows.png",
        "recall-cost-tokens.png",
        "recall-cost-seconds.png",
        "recall-context.png",
    ]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    without_score = (RowSummary("b", "r", 1, (), ("not run yet",)), pairs[0][1])
    assert save_plots([without_score], tmp_path) == []
