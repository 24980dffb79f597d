"""Two ranks (processes, gloo) train exactly as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.unit.learner_cases import assert_equal_updates, free, group, learner, write_model

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    model_path, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    basis = write_model(model_path)
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

    one = learner(model_path, basis, free())
    groups = [group(basis, (1.0, 0.0, 0.25))]
    start = one.weights(trainable_only=False)
    expected = [one.step(groups) for _ in range(2)]
    for zero_stage in (1, 3):
        for rank in range(2):
            found = json.loads((out / f"reports-{zero_stage}-{rank}.json").read_text())
            weights = safetensors.torch.load_file(out / f"weights-{zero_stage}-{rank}.safetensors")
            assert_equal_updates(weights, one.weights(trainable_only=False), start, 1e-4)
            for mine, theirs in zip(expected, found, strict=False):
                for key in ("loss", "grad_norm", "ratio_mean", "ratio_min", "ratio_max", "entropy", "engine_logprob_diff_max"):
                    assert theirs[key] == pytest.approx(getattr(mine, key), rel=1e-4), key
                assert theirs["action_tokens"] == mine.action_tokens
            assert found[2]["loss"] == found[1]["loss"]  # after load, the same step to the bit
