"""Two ranks (processes, gloo) train exactly as one does, under every ZeRO stage.

A checkpoint of one rank goes on with two, and the other way round.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
from torch import Tensor

from actors.fast_weights.delta import Basis
from actors.types import TrajectoryGroup
from learner.types import StepReport
from tests.unit.learner_cases import (
    assert_equal_updates,
    free,
    group,
    largest_relative_difference,
    learner,
    write_model,
)

ROOT = Path(__file__).resolve().parents[2]
STAGES = (0, 1, 2, 3)
OPTIMIZER = ("master", "exp_avg", "exp_avg_sq")
DIFFERENCE = "engine_logprob_diff_max"


@dataclass(frozen=True)
class TwoRanks:
    """What the ranks left in ``out``, beside two steps of one rank without interruption."""

    out: Path
    model_path: Path
    basis: Basis
    groups: list[TrajectoryGroup]
    weights: list[dict[str, Tensor]]  # of the one rank: before, between and after its steps
    reports: list[StepReport]  # of the one rank


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    folder = tmp_path_factory.mktemp("ranks")
    model_path, out = folder / "model", folder / "out"
    out.mkdir()
    basis = write_model(model_path)
    groups = [group(basis, (1.0, 0.0, 0.25))]
    for zero_stage in STAGES:
        single = learner(model_path, basis, free(zero_stage=zero_stage))
        single.step(groups)
        single.save(out / f"one-{zero_stage}")
    _run_ranks(model_path, out)
    one = learner(model_path, basis, free())
    weights, reports = [one.weights(trainable_only=False)], []
    for _ in range(2):
        reports.append(one.step(groups))
        weights.append(one.weights(trainable_only=False))
    return TwoRanks(out, model_path, basis, groups, weights, reports)


def _run_ranks(model_path: Path, out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    script = [sys.executable, str(ROOT / "tests/integration/learner_rank.py")]
    ranks = [
        subprocess.Popen(
            [*script, str(rank), port, str(model_path), str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-4000:]


@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_equal_one(two: TwoRanks, zero_stage: int) -> None:
    for rank in range(2):
        reports = json.loads((two.out / f"reports-{zero_stage}-{rank}.json").read_text())
        weights = safetensors.torch.load_file(two.out / f"weights-{zero_stage}-{rank}.safetensors")
        assert_equal_updates(weights, two.weights[2], two.weights[0], 1e-4)
        for alone, shared in zip(two.reports, reports, strict=False):
            for name in ("loss", "grad_norm", "entropy", "ratio_mean", "ratio_min", "ratio_max", DIFFERENCE):
                assert shared[name] == pytest.approx(getattr(alone, name), rel=1e-4), name
            assert shared["action_tokens"] == alone.action_tokens
        assert reports[2]["loss"] == reports[1]["loss"]  # after load, the same step to the bit


def test_a_step_without_signal_moves_no_rank_with_a_kl_term(two: TwoRanks) -> None:
    saved = [*(f"optimizer/{name}.safetensors" for name in OPTIMIZER), "model/model.safetensors"]
    for file in ("learner.json", *saved):
        assert (two.out / "tied" / file).read_bytes() == (two.out / "idle" / file).read_bytes(), file


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_checkpoint_of_one_rank_goes_on_with_two(two: TwoRanks, zero_stage: int) -> None:
    """Two ranks load what one rank saved, to the bit. Their next step is the same up to summation order."""
    for file in [*(f"optimizer/{name}.safetensors" for name in OPTIMIZER), "model/model.safetensors"]:
        saved, held = (
            safetensors.torch.load_file(two.out / f"{folder}-{zero_stage}" / file)
            for folder in ("one", "again")
        )
        assert saved.keys() == held.keys() and all(saved[name].equal(held[name]) for name in saved), file
    counters = [
        json.loads((two.out / f"{folder}-{zero_stage}" / "learner.json").read_text())
        for folder in ("one", "again")
    ]
    assert counters[1] == {**counters[0], "ranks": 2}
    for rank in range(2):
        grown = safetensors.torch.load_file(two.out / f"grown-{zero_stage}-{rank}.safetensors")
        assert_second_step(two, grown)


@pytest.mark.parametrize(("saved_under", "loaded_under"), [(0, 1), (1, 1), (1, 3), (2, 0), (3, 2), (3, 3)])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_two_ranks_goes_on_with_one_under_any_stage(
    two: TwoRanks, tmp_path: Path, saved_under: int, loaded_under: int
) -> None:
    alone = learner(two.model_path, two.basis, free(zero_stage=loaded_under))
    alone.load(two.out / f"checkpoint-{saved_under}")
    alone.save(tmp_path / "again")
    for name in OPTIMIZER:
        file = f"optimizer/{name}.safetensors"
        saved, held = (
            safetensors.torch.load_file(folder / file)
            for folder in (two.out / f"checkpoint-{saved_under}", tmp_path / "again")
        )
        assert all(saved[key].equal(held[key]) for key in saved), name
    assert alone.version == 1
    alone.step(two.groups)
    assert alone.version == 2
    assert_second_step(two, alone.weights(trainable_only=False))


def assert_second_step(two: TwoRanks, weights: dict[str, Tensor]) -> None:
    """Within 1e-4 (relative, per tensor) of the uninterrupted step.

    Without the step, or with a step that lacks Adam's moments, the distance is 10 times as large.
    """
    assert_equal_updates(weights, two.weights[2], two.weights[0], 1e-4)
    moved = largest_relative_difference(two.weights[1], two.weights[2])
    assert moved > 1e-3
