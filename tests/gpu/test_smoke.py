"""The stages of `make gpu-smoke` as tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.parts import make_model
from tests.gpu.smoke import STAGES, run_stage

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("smoke")
    make_model(made)
    return made


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_runs_on_this_gpu(stage: str, folder: Path) -> None:
    report = run_stage(stage, folder)
    assert "error" not in report, report["error"]
