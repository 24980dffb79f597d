"""The engine's tests again, on the paths that a GPU takes (tests/gpu/emulation.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "test_engine.py",
    "test_engine_refresh.py",
    "test_engine_stand_ins.py",
    "test_engine_writer.py",
    "test_in_flight.py",
    "test_parity.py",
)
pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_engine_writer_refresh_and_parity_hold_on_the_paths_of_a_gpu() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = ["tests/gpu/emulated.py", *(f"tests/integration/{name}" for name in FILES)]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "-p", "tests.gpu.emulation", *files],
        cwd=ROOT,
        env=own,
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    counts = re.search(r"(\d+) passed", ran.stdout)
    assert counts is not None and int(counts[1]) >= 30, ran.stdout[-500:]
