"""The learner's benchmark at its quick size on the tiny model.

It runs and compares like with like, and its groups have the form of a rollout's.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from actors import peak_memory
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, check
from actors.text.chat_template import ChatFormat
from actors.types import TrajectoryGroup
from cluster.bench.learner import WAYS, head, padding_case
from cluster.bench.machine import peak_above
from cluster.bench.scripted import QUICKSTART, recall_groups, without_deltas
from cluster.bench.values import BenchError, Context
from cluster.cli import main
from configs.load import load_config
from configs.schema import RunConfig

pytestmark = pytest.mark.slow


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
    for first, second in zip(groups[0].trajectories, again.trajectories, strict=False):
        for a, b in zip(first.segments, second.segments, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))
    rewards = set()
    for trajectory in (trajectory for group in groups for trajectory in group.trajectories):
        rewards.add(trajectory.outcome.reward)
        writes = len(trajectory.revisions)
        # Questions beyond L_max go on in a cleared context, under the same revision.
        acts = len(trajectory.segments) - writes
        revisions = [segment.revision for segment in trajectory.segments]
        assert acts >= 1 and revisions == [*range(writes), *[writes] * acts]
        kinds = [segment.spans[0].kind for segment in trajectory.segments]
        assert kinds == ["extract"] * writes + ["act"] * acts
        for weights in trajectory.revisions:
            check(weights, basis)
        for segment in trajectory.segments:
            assert 30 <= len(segment.token_ids) <= 250 and (segment.logprobs[segment.action_mask] < 0).all()
        opening = trajectory.segments[0]
        assert chat.decode(opening.token_ids[opening.action_mask]).startswith('[{"instruction": ')
    assert len(rewards) > 1
    bare = [trajectory for group in without_deltas(groups) for trajectory in group.trajectories]
    assert not any(trajectory.revisions for trajectory in bare)
    assert all(segment.revision == 0 for trajectory in bare for segment in trajectory.segments)


def test_padding_is_counted_and_under_a_tenth(groups: tuple[TrajectoryGroup, ...], config: RunConfig) -> None:
    case = padding_case(groups, config)
    assert case.goal is not None and case.goal.met(case.ratios.median)
    tokens = [
        len(segment.token_ids)
        for group in groups
        for trajectory in group.trajectories
        for segment in trajectory.segments
    ]
    assert sum(tokens) / 2 < case.baseline_values[0] <= sum(tokens) and case.ratios.median > 1


def touch(mib: int) -> int:
    """Write every byte of ``mib`` MiB, then free them."""
    return np.ones(mib * 2**20, np.uint8).nbytes


def test_the_peak_is_that_of_the_work_not_of_what_came_before() -> None:
    touch(256)
    result, peak = peak_above(lambda: touch(64))
    assert result == 64 * 2**20
    assert 55 * 2**20 < peak < 90 * 2**20
    assert peak_above(lambda: touch(8))[1] < 30 * 2**20  # the 64 MiB before are forgotten


def test_quick_benchmark(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing here is compiled, yet the import of DeepSpeed's optimizers would load torch's compiler, for
    # seconds.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    options = ["--quick", "--repeats", "1", "--no-tracking", "--output-dir", str(tmp_path)]
    assert main(["bench", "learner", *options, "--model", str(tiny_model_path)]) == 0
    (report,) = tmp_path.rglob("report.json")
    outcome = json.loads(report.read_text())["benchmarks"]["learner"]
    steps = [f"step, {part}, {clock}" for part in ("last_layers", "full") for clock in ("CPU", "wall")]
    assert [case["name"] for case in outcome["cases"]] == [*steps, "padding"]
    assert [case["goal"]["value"] for case in outcome["cases"]][:4] == [1.05] * 4
    peaks = {name: value for name, value in outcome["figures"].items() if name.startswith("head_peak_mib")}
    assert len(peaks) == len(WAYS)
    plain, ours = (value for name, value in peaks.items() if "torch" not in name)
    assert ours < plain  # full logits are several times what the chunks are, also at this size
    assert len(outcome["tables"][0]["rows"]) == len(WAYS)


def test_without_proc_the_heads_memory_is_left_out_with_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peak_memory, "_PROC", tmp_path / "no-proc")
    table, figures = head(Context(tmp_path, repeats=1, threads=1, quick=True, folder=tmp_path))
    assert "not measured" in table.title and "no-proc" in table.rows[0][0]
    assert figures == {}
    with pytest.raises(BenchError, match="/proc"):
        peak_above(lambda: None)
