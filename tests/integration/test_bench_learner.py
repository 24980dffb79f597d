"""The learner's benchmark at its quick size on the tiny model: it runs, compares like with like, and its groups are what a rollout would give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from actors import peak_memory
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, check
from actors.text.chat_template import ChatFormat
from actors.types import TrajectoryGroup
from cluster.bench import memory
from cluster.bench.learner import QUICKSTART, head, padding_of, sort_and_fill
from cluster.bench.learner_groups import recall_groups, shared_prefix_fraction, without_deltas
from cluster.bench.learner_head import WAYS
from cluster.bench.values import BenchError, Context
from cluster.cli import main
from configs.load import load_config
from configs.schema import RunConfig
from learner.batch import supervised_rows


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(QUICKSTART, [])


@pytest.fixture(scope="module")
def basis(tiny_model_path: Path, config: RunConfig) -> Basis:
    return compute_basis_from_checkpoint(tiny_model_path, config.fast_weights, 0)


@pytest.fixture(scope="module")
def groups(tiny_model_path: Path, config: RunConfig, basis: Basis) -> tuple[TrajectoryGroup, ...]:
    return recall_groups(tiny_model_path, config, basis, config.train.tasks_per_step, config.train.group_size)


def test_groups_have_the_quickstarts_form(
    groups: tuple[TrajectoryGroup, ...], tiny_model_path: Path, config: RunConfig, basis: Basis
) -> None:
    again = recall_groups(tiny_model_path, config, basis, 1, 2)[0]
    for one, other in zip(groups[0].trajectories, again.trajectories, strict=False):
        pairs = zip(one.segments, other.segments, strict=True)
        assert all(
            np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
            for a, b in pairs
        )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    chat = ChatFormat(tokenizer)
    rewards = set()
    for trajectory in (one for group in groups for one in group.trajectories):
        rewards.add(trajectory.outcome.reward)
        assert [segment.revision for segment in trajectory.segments] == list(
            range(len(trajectory.revisions) + 1)
        )
        assert [segment.spans[0].kind for segment in trajectory.segments] == ["extract"] * len(
            trajectory.revisions
        ) + ["act"]
        for weights in trajectory.revisions:
            check(weights, basis)
        for segment in trajectory.segments:
            assert 50 <= len(segment.token_ids) <= 200 and (segment.logprobs[segment.action_mask] < 0).all()
        first = trajectory.segments[0]
        assert chat.decode(first.token_ids[first.action_mask]).startswith('[{"instruction": ')
    assert len(rewards) > 1
    bare = [one for group in without_deltas(groups) for one in group.trajectories]
    assert all(segment.revision == 0 for one in bare for segment in one.segments) and not any(
        one.revisions for one in bare
    )


def test_padding_is_counted_and_under_a_tenth(groups: tuple[TrajectoryGroup, ...], config: RunConfig) -> None:
    case, table = padding_of(groups, config)
    assert case.goal is not None and case.goal.met(case.ratios.median)
    assert [line[1] for line in table.rows] == ["1", "1", "2", "4"]
    rows = supervised_rows(
        [segment for group in groups for one in group.trajectories for segment in one.segments]
    )
    assert sort_and_fill(rows[:3], 10**6) == [3 * max(len(row.segment.token_ids) for row in rows[:3])]
    assert sort_and_fill(rows, 1) == sorted((len(row.segment.token_ids) for row in rows), reverse=True)


def test_shared_prefixes_are_counted_by_hand(groups: tuple[TrajectoryGroup, ...]) -> None:
    one = groups[0].trajectories[0]
    first, *rest = one.segments
    other = replace(
        first,
        token_ids=np.concatenate([first.token_ids[:10], [1, 2, 3]]).astype(np.int32),
        action_mask=np.zeros(13, bool),
        logprobs=np.zeros(13, np.float32),
        spans=(),
    )
    pair = replace(groups[0], trajectories=(one, replace(one, segments=(other, *rest))))
    total = 2 * sum(len(segment.token_ids) for segment in rest) + len(first.token_ids) + 13
    assert shared_prefix_fraction([pair]) == pytest.approx(10 / total)


def touch(mib: int) -> int:
    """Every byte written, then freed."""
    return np.ones(mib * 2**20, np.uint8).nbytes


def test_the_peak_is_that_of_the_work_not_of_what_came_before() -> None:
    touch(256)
    result, peak = memory.peak_above(lambda: touch(64))
    assert result == 64 * 2**20
    assert 55 * 2**20 < peak < 90 * 2**20
    assert memory.peak_above(lambda: touch(8))[1] < 30 * 2**20  # the 64 MiB before are forgotten


def test_quick_benchmark(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "TORCHDYNAMO_DISABLE", "1"
    )  # nothing here is compiled, yet importing DeepSpeed's optimizers loads torch's compiler: seconds
    arguments = [
        "bench",
        "learner",
        "--quick",
        "--repeats",
        "1",
        "--no-tracking",
        "--output-dir",
        str(tmp_path),
        "--model",
        str(tiny_model_path),
    ]
    assert main(arguments) == 0
    (report,) = tmp_path.rglob("report.json")
    found = json.loads(report.read_text())["benchmarks"]["learner"]
    names = [case["name"] for case in found["cases"]]
    assert names == [
        "step, last_layers, CPU",
        "step, last_layers, wall",
        "step, full, CPU",
        "step, full, wall",
        "padding",
    ]
    assert [case["goal"]["value"] for case in found["cases"]][:4] == [1.05] * 4
    peaks = {name: value for name, value in found["figures"].items() if name.startswith("head_peak_mib")}
    assert len(peaks) == len(WAYS)
    plain, ours = (value for name, value in peaks.items() if "torch" not in name)
    assert ours < plain  # full logits are several times what the chunks are, also at this size
    assert [Path(plot).name for plot in found["plots"]] == ["learner-head-memory.png"] and next(
        tmp_path.rglob("*.png")
    ).stat().st_size > 1000


def test_without_proc_the_heads_memory_is_left_out_with_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peak_memory, "_PROC", tmp_path / "no-proc")
    table, plots, figures = head(Context(tmp_path, repeats=1, threads=1, quick=True, folder=tmp_path))
    assert "not measured" in table.title and "no-proc" in table.rows[0][0]
    assert (plots, figures) == ((), {})
    with pytest.raises(BenchError, match="/proc"):
        memory.peak_above(lambda: None)
