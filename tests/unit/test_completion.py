"""Completion of the command line with Tab."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from cluster.cli import main
from configs.reference import settings
from configs.shipped import shipped
from tests.unit.test_cli import COMMANDS, ROOT


def completion_variables(line: str, shell: str) -> dict[str, str]:
    """What the shell's completion script sets when Tab is pressed at the end of ``line``."""
    words = shlex.split(line.replace("=", " = ") if shell == "bash" else line)
    words += [""] if line.endswith((" ", "=")) else []
    return {
        "_ENGRAM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


def complete(line: str) -> list[str]:
    """What Tab offers in bash."""
    variables, out = completion_variables(line, "bash"), io.StringIO()
    with patch.dict(os.environ, variables), redirect_stdout(out), pytest.raises(SystemExit, match="0"):
        main([])
    return out.getvalue().split()


@pytest.mark.parametrize(
    ("shell", "line", "offered"),
    [
        ("bash", "engram train quickstart train.st", "train.steps=\n"),
        ("zsh", "engram train quickstart environment.name=rec", '"environment.name=recall"'),
        ("fish", "engram train qu", "quickstart\n"),
    ],
)
def test_tab_in_a_shell(shell: str, line: str, offered: str) -> None:
    environment = {**os.environ, **completion_variables(line, shell)}
    command = [sys.executable, "-m", "cluster"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and offered in done.stdout


def test_tab_completes_commands_options_and_configurations() -> None:
    assert complete("engram ") == list(COMMANDS)
    assert complete("engram sta") == ["status"]
    assert complete("engram train --pr") == ["--print-config"]
    assert complete("engram train qu") == ["quickstart"]
    assert set(complete("engram evaluate ")) == set(shipped())
    assert complete("engram train runs/") == []  # the shell completes paths


def test_tab_completes_settings_and_their_values() -> None:
    assert complete("engram train quickstart train.st") == ["train.steps="]
    assert len(complete("engram train quickstart ")) == len(settings())
    assert complete("engram train quickstart train.steps=3 learner.dt") == ["learner.dtype="]
    assert complete("engram train quickstart environment.name=rec") == ["recall", "records"]
    assert complete("engram train quickstart write.optimizer=") == ["sgd", "adam", "natural"]
    assert complete("engram train quickstart train.steps=") == []
    assert "true" in complete("engram train quickstart engine.enforce_eager=")


def test_tab_completes_rows_studies_and_benchmarks() -> None:
    assert complete("engram evaluate quickstart --rows tmem,trunc") == ["tmem,truncation"]
    assert complete("engram evaluate quickstart --benchmarks loc") == ["locomo", "locomo_beyond"]
    assert complete("engram probe quickstart --study st") == ["steps"]
    assert complete("engram bench wri") == ["writer"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_for_the_shell(shell: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "cluster", "--install-completion", shell]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"{shell} completion installed" in done.stdout, done.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert f"complete_{shell}" in written and "_ENGRAM_COMPLETE" in written
