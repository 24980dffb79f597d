"""What libraries print is kept out of a command's output; our own warnings are not."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from cluster.common.quiet import quiet

PRINTS_ALL_WAYS = """
    import logging, os, sys, warnings
    from cluster.common.quiet import quiet

    with quiet(verbose={verbose}):
        os.write(2, b"from C++\\n")
        os.system("echo from a child >&2")
        print("from a bar", file=sys.stderr)
        warnings.warn("from Python")
        logging.getLogger("torch").warning("from a logger")
        logging.getLogger("cluster.x").warning("of ours")
        print("an answer")
        {then}
"""


def ran(folder: Path, verbose: bool = False, then: str = "pass") -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(PRINTS_ALL_WAYS).format(verbose=verbose, then=then)
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )


def test_only_our_lines_are_seen_and_no_file_stays(tmp_path: Path) -> None:
    done = ran(tmp_path)
    assert (done.stdout, done.stderr) == ("an answer\n", "of ours\n")
    assert list(tmp_path.iterdir()) == []


def test_verbose_shows_all(tmp_path: Path) -> None:
    said = ran(tmp_path, verbose=True).stderr
    assert all(text in said for text in ("C++", "a child", "a bar", "Python", "a logger", "of ours"))


def test_a_command_that_fails_names_the_file(tmp_path: Path) -> None:
    done = ran(tmp_path, then="raise RuntimeError('broken')")
    assert done.stderr.endswith("RuntimeError: broken\n") and "from C++" not in done.stderr
    (named,) = re.findall(r"what libraries printed: (\S+) \(--verbose shows it\)", done.stdout)
    kept = Path(named).read_text()
    assert all(text in kept for text in ("from C++", "a child", "a bar", "from Python", "from a logger"))
    assert "of ours" not in kept and done.stderr.startswith("of ours\n")
    mistake = ran(tmp_path, then="raise ValueError('a mistake')")
    assert "what libraries printed" not in mistake.stdout


def test_a_librarys_log_handler_outlives_the_block(tmp_path: Path) -> None:
    adds = "import atexit; log = logging.getLogger('vllm'); log.addHandler(logging.StreamHandler())"
    done = ran(tmp_path, then=f"{adds}; atexit.register(log.error, 'at the exit')")
    assert (done.stdout, done.stderr) == ("an answer\n", "of ours\n")


def test_stderr_is_as_it_was_behind_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr, logging.lastResort, warnings.filters[:]
    with quiet(verbose=False):
        assert os.environ["VLLM_LOGGING_LEVEL"]
    os.write(2, b"heard\n")
    assert (sys.stderr, logging.lastResort, warnings.filters[:]) == before
    assert capfd.readouterr().err == "heard\n"
