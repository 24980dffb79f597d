"""What `engram plan` computes against what a real process grows by, on a CPU at 135M: within 15 %."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.sizing.memory import held, learner_parts, peak
from configs.load import load_config
from configs.models import model_shape

pytestmark = pytest.mark.slow


def measured(kind: str, model: Path, *settings: str) -> tuple[int, int]:
    """Bytes that a process of its own grew by: held, and at its peak."""
    command = [sys.executable, "-m", "tests.integration.sizing_process", kind, str(model), *settings]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    _, first, second = found.stdout.strip().splitlines()[-1].split()
    return int(first), int(second)


@pytest.mark.parametrize(
    "settings",
    [
        ["learner.microbatch_tokens=256"],
        ["learner.microbatch_tokens=512", "learner.trainable=last_layers"],
    ],
    ids=["full", "last_layers"],
)
def test_a_learner_grows_by_what_the_plan_says(model_path: Path, settings: list[str]) -> None:
    config = load_config(None, settings)
    parts = learner_parts(model_shape(config.model), config.learner, reference=False)
    found = measured("learner", model_path, *settings)
    print("measured", found, "planned", held(parts), peak(parts))
    assert (held(parts), peak(parts)) == pytest.approx(found, rel=0.15)
