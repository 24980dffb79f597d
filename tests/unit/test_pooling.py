"""Runs pooled over seeds: gains are paired by seed, task and item, and groups compared on shared tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from actors.types import Answer
from cluster.cli import main
from cluster.common.errors import CheckpointError
from cluster.compare.command import EXAMPLES
from cluster.compare.report import ALPHAS, Pool, pool_groups, save_pool
from cluster.compare.runs import FREE, MAY_DIFFER, load_groups
from cluster.measure.rows import EpisodeScore, RowResult, save_row
from cluster.measure.statistics import holm, seeds_needed
from configs.load import load_config, to_yaml

QUICKSTART = Path(__file__).parents[2] / "tests" / "quickstart.yaml"
FIXED = "question {number}"  # the item where every seed gets the same questions
BEFORE = (0.0, 0.5, 0.5, 0.25, 0.0, 0.5)
AFTER = (0.5, 0.25, 1.0, 0.25, 0.25, 0.5)  # six questions: a gain that may be chance


def save_run(
    folder: Path,
    name: str,
    seed: int,
    stages: dict[str, Sequence[float]],
    more: Sequence[str] = (),
    item: str = "seed {seed}, question {number}",
) -> Path:
    """A run whose tasks 0, 1, ... have the given F1 at each stage; without scores, one failed episode."""
    run = folder / f"{name}-{seed}-{len(more)}"
    (run / "report").mkdir(parents=True)
    config = load_config(QUICKSTART, [f"name={name}", f"seed={seed}", *more])
    (run / "config.yaml").write_text(to_yaml(config))
    for stage, scores in stages.items():
        episodes = tuple(
            episode(f"task-{seed}-{number}", item.format(seed=seed, number=number), score)
            for number, score in enumerate(scores)
        )
        failed = () if scores else ("engine: out of memory",)
        save_row(RowResult(stage, 0, episodes, failed), run / "evaluation" / f"{stage}.json")
    (run / "report" / "report.json").write_text(json.dumps({"rewards": [0.1, 0.2, 0.3], "rows": []}))
    return run


def episode(task: str, item: str, score: float) -> EpisodeScore:
    answer = Answer("q", ("a",), "a", "c", {"f1": score, "em": float(score == 1)})
    return EpisodeScore(task, item, score, {}, (answer,), {}, {}, 1, 1, 1, 0.0)


def pooled(*folders: Path) -> Pool:
    return pool_groups(load_groups(folders))


def rows_of(pool: Pool, place: int) -> tuple[tuple[str, ...], ...]:
    return list(pool.tables())[place].rows


def test_gains_are_paired_and_groups_compared_on_shared_tasks(tmp_path: Path) -> None:
    """Seed 1 and the third task were not played by both groups."""
    pool = pooled(
        save_run(tmp_path, "tmem", 0, {"after_warm_start": [0.0, 0.5], "after_rl": [0.5, 1.0]}),
        save_run(tmp_path, "tmem", 1, {"after_warm_start": [0.25, 0.5], "after_rl": [0.5, 0.5]}),
        save_run(tmp_path, "off", 0, {"after_warm_start": [0.0, 0.0, 0.0], "after_rl": [0.0, 0.25, 1.0]}),
    )
    tmem, off = pool.gains
    assert (tmem.name, tmem.stage, tmem.change.by_seed) == ("tmem", "after_warm_start", (0.5, 0.125))
    assert (tmem.change.over_questions.count, tmem.change.over_questions.mean) == (4, 0.3125)
    over_questions = off.change.over_questions
    assert (over_questions.count, over_questions.mean) == (3, pytest.approx(1.25 / 3))
    (versus,) = pool.versus
    assert (versus.name, versus.other, versus.change.over_questions.count) == ("tmem", "off", 2)
    assert versus.change.over_questions.mean == pytest.approx(0.5 - 0.125)
    assert (versus.change.over_seeds.count, versus.change.by_seed) == (1, (pytest.approx(0.375),))


def test_a_gain_is_claimed_over_seeds(tmp_path: Path) -> None:
    """Twenty questions a seed all gain, by an amount of the seed: the runs are three pieces of evidence."""
    gains = (0.1, 0.3, 0.5)
    for seed, gained in enumerate(gains):
        save_run(tmp_path, "tmem", seed, {"before": [0.2] * 20, "after_rl": [0.2 + gained] * 20})
        save_run(tmp_path, "off", seed, {"before": [0.2] * 20, "after_rl": [0.2] * 20})
    pool = pooled(*sorted(tmp_path.glob("tmem-*")), *sorted(tmp_path.glob("off-*")))
    (tmem, off), (versus,) = pool.gains, pool.versus
    expected = ttest_1samp(gains, 0)
    interval = expected.confidence_interval(0.95)
    for change in (tmem.change, versus.change):
        seeds = change.over_seeds
        assert (seeds.mean, seeds.count) == (pytest.approx(0.3), 3)
        assert (seeds.low, seeds.high) == pytest.approx((interval.low, interval.high))
        assert seeds.p_value == pytest.approx(expected.pvalue)
        assert change.over_questions.p_value < 1e-6 and change.over_questions.count == 60
    assert off.change.over_seeds.low < -0.01 < 0.01 < off.change.over_seeds.high  # equal, and not certain
    cells = rows_of(pool, 1)[0]
    assert cells[3:5] == ("3", "+30.0 [-19.7, +79.7]")
    assert cells[5:8] == (f"{expected.pvalue:.4f}", f"{2 * expected.pvalue:.4f}", "+10.0, +30.0, +50.0")
    assert not any("tell nothing of other seeds" in note for note in pool.notes())


def test_the_seeds_that_a_gain_needs_follow_from_the_spread_over_seeds(tmp_path: Path) -> None:
    for seed, gained in enumerate((0.26, 0.30, 0.34)):
        save_run(tmp_path, "tmem", seed, {"before": [0.2] * 20, "after_rl": [0.2 + gained] * 20})
        save_run(tmp_path, "flat", seed, {"before": [0.2] * 20, "after_rl": [0.5] * 20})
    pool = pooled(*sorted(tmp_path.glob("*-*")))
    (power,) = [table for table in pool.tables() if table.title == "How many seeds a gain needs"]
    assert [line[0] for line in power.rows] == ["tmem since before", "flat against tmem"]
    assert power.rows[0][1:3] == ("3", "4.0") and power.rows[0][3].startswith("13.1 / ")
    assert power.rows[0][4:] == ("34 / 51", "8 / 11", "4 / 6")
    alone = pooled(*(save_run(tmp_path, "two", seed, {"after_rl": [0.9]}) for seed in (0, 1)))
    assert len(list(alone.tables())) == 1, "two seeds have no spread worth a plan"


def test_the_plan_in_the_help_is_that_of_the_statistics() -> None:
    lines = re.findall(r"^ +(\d+)((?: +\d+ / \d+){4})$", EXAMPLES, re.MULTILINE)
    found = {(int(spread), *re.findall(r"\d+ / \d+", cells)) for spread, cells in lines}
    expected = {
        (
            spread,
            *(
                " / ".join(str(seeds_needed(gain, spread, alpha)) for alpha in ALPHAS)
                for gain in (2, 5, 10, 20)
            ),
        )
        for spread in (2, 4, 8)
    }
    assert found == expected


def test_one_or_two_seeds_have_no_p(tmp_path: Path) -> None:
    stages = {"before": [0.0] * 20, "after_rl": [0.9] * 20}
    pool = pooled(*(save_run(tmp_path, "tmem", seed, stages) for seed in (0, 1)))
    assert rows_of(pool, 1)[0][3:8] == ("2", "+90.0", "-", "-", "+90.0, +90.0")
    few = "tmem: 2 seed(s) tell nothing of other seeds: no interval and no p; train 3 seeds or more."
    assert list(pool.notes())[1:] == [few]


def test_groups_are_compared_since_the_last_stage_before_rl(tmp_path: Path) -> None:
    stages = {"before": [0.0], "after_warm_start": [0.25], "after_rl": [1.0]}
    warm = save_run(tmp_path, "warm", 0, stages)
    also = save_run(tmp_path, "also", 0, {**stages, "after_rl": [0.5]})
    cold = save_run(tmp_path, "cold", 0, {"before": [0.5], "after_rl": [0.5]})
    first, second = pooled(warm, also, cold).versus
    assert (first.other, first.stage, first.change.over_questions.mean) == ("also", "after_warm_start", 0.5)
    assert (second.other, second.stage, second.change.over_questions.mean) == ("cold", "before", 1.0)


def test_a_question_under_several_seeds_is_no_new_evidence(tmp_path: Path) -> None:
    """A fixed eval set under five seeds: interval and p are those of six questions, not of thirty."""
    stages, off = {"before": BEFORE, "after_rl": AFTER}, {"before": BEFORE, "after_rl": BEFORE}
    once = pooled(
        save_run(tmp_path / "once", "tmem", 0, stages, item=FIXED),
        save_run(tmp_path / "once", "off", 0, off, item=FIXED),
    )
    again = [
        save_run(tmp_path, name, seed, played, item=FIXED)
        for name, played in (("tmem", stages), ("off", off))
        for seed in range(5)
    ]
    five = pooled(*again)
    for first, second in zip((*once.gains, *once.versus), (*five.gains, *five.versus), strict=True):
        assert first.change.over_questions == second.change.over_questions
    gain = five.gains[0].change
    assert gain.over_questions.p_value > 0.1
    assert gain.over_seeds.p_value == gain.over_questions.p_value  # five equal seeds are no surer
    assert rows_of(five, 0)[0][2:4] == ("30 of 6 questions", rows_of(once, 0)[0][3])

    folders = [save_run(tmp_path / "apart", "tmem", seed, stages) for seed in range(5)]
    apart = pooled(*folders).gains[0].change.over_questions
    assert apart.count == 30  # thirty questions are more evidence
    assert apart.p_value < 0.05


def test_seeds_of_one_question_are_averaged(tmp_path: Path) -> None:
    """The first question gained (1 + 0) / 2, the other 0."""
    first = save_run(tmp_path, "tmem", 0, {"before": [0.0, 0.0], "after_rl": [1.0, 0.0]}, item=FIXED)
    second = save_run(tmp_path, "tmem", 1, {"before": [0.5], "after_rl": [0.5]}, item=FIXED)
    pool = pooled(second, first)  # in the order of seeds all the same
    (gain,) = pool.gains
    assert rows_of(pool, 0)[0][0] == "tmem (seeds 0, 1)"
    assert (gain.change.over_questions.count, gain.change.over_questions.mean) == (2, 0.25)
    assert gain.change.by_seed == (0.5, 0.0)


def test_equal_ids_of_different_questions_are_not_paired(tmp_path: Path) -> None:
    """Recall names its tasks by seed and place, whatever environment.recall.* asks."""
    stages = {"before": [0.0, 0.5], "after_rl": [0.5, 1.0]}
    other = save_run(tmp_path, "long", 0, stages, item="another question {number}")
    mixed = save_run(tmp_path, "mixed", 0, {"before": [0.0], "after_rl": [0.0]})
    pool = pooled(save_run(tmp_path, "tmem", 0, stages), other, mixed)
    first, second = pool.versus
    assert (first.change.over_questions.count, first.not_paired) == (0, 2)
    over_questions = second.change.over_questions
    assert (over_questions.count, over_questions.mean, second.not_paired) == (1, 0.5, 0)
    assert rows_of(pool, 2)[0] == ("tmem", "long", "before", "0", "-", "-", "-", "-", "0", "-")
    (note,) = list(pool.notes())[4:]  # behind the legend and three groups of one seed
    assert "tmem and long: 2 task(s) of the same seed and id ask different things" in note
    assert "\n" not in note
    apart = pooled(mixed, save_run(tmp_path, "tmem", 1, stages))
    said = "mixed and tmem share no finished task: their gains cannot be compared."
    assert list(apart.notes())[3:] == [said]


def test_what_failed_is_a_dash_and_null_and_no_test(tmp_path: Path) -> None:
    stages, failed = {"before": BEFORE, "after_rl": AFTER}, {"before": BEFORE, "after_rl": []}
    pool = pooled(
        save_run(tmp_path, "tmem", 0, stages),
        save_run(tmp_path, "tmem", 1, stages),
        save_run(tmp_path, "tmem", 2, stages),
        save_run(tmp_path, "tmem", 3, failed),
        save_run(tmp_path, "off", 0, failed),
    )
    gains = rows_of(pool, 1)
    assert gains[0][3] == "3" and gains[0][7].endswith(", -")
    assert gains[1][3:] == ("0", "-", "-", "-", "-", "0", "-")
    p_value = pool.gains[0].change.over_seeds.p_value
    assert gains[0][5] == gains[0][6] == f"{p_value:.4f}" != f"{holm([p_value, 1.0])[0]:.4f}"
    assert rows_of(pool, 0)[-1] == ("off (seeds 0)", "after_rl", "0", "-", "-", "1")
    save_pool(pool, tmp_path / "pool")
    saved = json.loads((tmp_path / "pool" / "compare.json").read_text(), parse_constant=pytest.fail)
    changes = [gain["change"] for gain in saved["gains"]]
    assert changes[0]["by_seed"][3] is None and changes[1]["over_seeds"]["mean"] is None
    assert "nan" not in (tmp_path / "pool" / "compare.md").read_text()


def test_models_that_differ_inside_a_group_are_named(tmp_path: Path) -> None:
    stages = {"before": [0.0], "after_rl": [0.5]}
    folders = [save_run(tmp_path, "tmem", seed, stages, [f"model.name=start-{seed}"]) for seed in (0, 1)]
    note = "tmem: its runs start from different models (seed 0: start-0, seed 1: start-1)."
    pool = pooled(*folders, save_run(tmp_path, "off", 0, stages))
    assert note in pool.notes()
    save_pool(pool, tmp_path / "pool")
    assert f"- {note}\n" in (tmp_path / "pool" / "compare.md").read_text()
    for text in (EXAMPLES, MAY_DIFFER):
        assert [key for key in FREE if key.rstrip(".") not in text] == []


def test_runs_of_one_group_may_begin_on_different_days(tmp_path: Path) -> None:
    stages, days = {"before": [0.0], "after_rl": [0.5]}, ("2026-01-01", "2026-01-02")
    folders = [
        save_run(tmp_path, "tmem", seed, stages, [f"model.date={day}"]) for seed, day in enumerate(days)
    ]
    (group,) = load_groups(folders)
    assert [run.config.model.date for run in group.runs] == list(days)


def test_an_output_that_cannot_be_written_is_one_line_before_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path, "tmem", 0, {"before": [0.0], "after_rl": [0.5]})
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    (tmp_path / "taken" / "compare.md").mkdir(parents=True)
    for folder, reason in ((file, "it is no folder"), (file / "pool", "Not a directory")):
        assert main(["compare", str(run), "--output", str(folder)]) == 2
        said = capsys.readouterr()
        cure = "name another folder with --output"
        assert (said.out, said.err) == ("", f"error: {folder}: cannot be written ({reason}); {cure}\n")
    assert file.read_text() == "mine"
    taken = str(tmp_path / "taken")  # its pool.md is a folder: only writing shows that
    assert main(["compare", str(run), "--output", taken]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stage_that_one_run_has_not_got_is_left_out(tmp_path: Path) -> None:
    pool = pooled(
        save_run(tmp_path, "tmem", 0, {"before": [0.0], "after_rl": [0.5]}),
        save_run(tmp_path, "tmem", 1, {"after_rl": [0.5]}),
    )
    assert pool.gains == ()
    assert [line[1] for line in rows_of(pool, 0)] == ["after_rl"]


def test_from_the_command_line_to_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"before": [0.0, 0.5], "after_rl": [0.5, 1.0]}
    runs = [str(save_run(tmp_path, name, seed, stages)) for name in ("tmem", "off") for seed in (0, 1)]
    assert main(["compare", *runs, "--output", str(tmp_path / "pool")]) == 0
    assert "+50.0, +50.0" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "pool").iterdir()} == {
        "compare.md",
        "compare.json",
        "reward.png",
        "gains.png",
    }
    assert (
        json.loads((tmp_path / "pool" / "compare.json").read_text())["gains"][0]["change"]["over_seeds"][
            "mean"
        ]
        == 0.5
    )
    text = (tmp_path / "pool" / "compare.md").read_text()
    assert "## Whether it gained more" in text and f"- tmem: {runs[0]}, {runs[1]}\n" in text


def test_what_does_not_belong_together_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = {"before": [0.0], "after_rl": [0.5]}
    first = save_run(tmp_path, "tmem", 0, done)
    damaged = save_run(tmp_path, "damaged", 0, done)
    (damaged / "report" / "report.json").write_text('{"rewards": ["0.1"]}')
    killed = save_run(tmp_path, "killed", 0, done)  # between its last row and its report
    (killed / "report" / "report.json").unlink()
    again, longer = (save_run(tmp_path, "tmem", seed, done, ["train.steps=9"]) for seed in (0, 1))
    second = save_run(tmp_path, "tmem", 1, done)
    unfinished = save_run(tmp_path, "unfinished", 0, {"before": [0.0]})
    cases = [
        ([tmp_path / "nowhere"], "holds no config.yaml"),
        ([unfinished], "its run has not finished"),
        ([killed], r"killed.*: its run has not finished \(no report/report\.json\); go on with resume="),
        ([damaged], r"report\.json cannot be used: rewards.0: .*; go on with resume="),
        ([first, again], "is a second run of name=tmem seed=0"),
        ([first, second, again], "is a second run of name=tmem seed=0"),
        ([first, longer], "has train.steps=9.* nothing but seed, model.name"),
    ]
    for folders, part in cases:
        with pytest.raises(CheckpointError, match=part) as caught:
            load_groups(folders)
        assert "\n" not in str(caught.value)
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
