"""Keeps what libraries print out of a command's output: vLLM, DeepSpeed, torch, Triton, Ray, progress bars.

    our lines          --> stdout, and stderr for errors
    a library's lines  --> a file in the temporary folder: deleted at a good end, named where a command fails

They write to stderr in many ways: Python's logging and warnings, tqdm, and C++ straight to file descriptor 2.
So the descriptor itself is turned away, for this process and those that it starts.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from cluster.common.printable import visible

Verbose = Annotated[bool, typer.Option("--verbose", help="show what libraries print, too")]
_OURS = ("cluster", "actors", "learner", "configs", "uvicorn")  # uvicorn tells of faults in ``serve``
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Turn stderr into a file during the block; ``verbose``: leave it. Our own warnings still reach the user.

    Environment variables that the user set are left as they are.
    """
    if verbose:
        yield
        return
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    number, name = tempfile.mkstemp(prefix="engram-", suffix=".log")
    path, stderr, last_resort = Path(name), sys.stderr, logging.lastResort
    stderr.flush()
    shown = os.dup(2)
    failed = False
    try:
        with os.fdopen(os.dup(shown), "w") as terminal:
            file = _lasting(number)
            os.dup2(number, 2)
            sys.stderr, logging.lastResort = file, _LastResort(terminal, file)
            try:
                yield
            except Exception as error:
                failed = not isinstance(error, ValueError)  # that is a user's mistake, and says all
                raise
            finally:
                file.flush()
                os.dup2(shown, 2)
                sys.stderr, logging.lastResort = stderr, last_resort
    finally:
        os.close(shown)
        if failed and path.stat().st_size:
            sys.stdout.write(f"what libraries printed: {path} (--verbose shows it)\n")
            sys.stdout.flush()
        else:
            path.unlink(missing_ok=True)


def _lasting(number: int) -> TextIO:
    """A stream that stays open while anybody holds it: a library's log handler, made in the block, may."""
    file = os.fdopen(number, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    weakref.finalize(file, os.close, number).atexit = False  # libraries log at the exit, too
    return file


class _LastResort(logging.Handler):
    """What Python calls for a warning that nobody handles. Ours reach the user, a library's the file."""

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        super().__init__(logging.WARNING)
        self._ours, self._others = logging.StreamHandler(terminal), logging.StreamHandler(file)
        self._ours.setFormatter(_Visible())

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] in _OURS
        (self._ours if ours else self._others).emit(record)


class _Visible(logging.Formatter):
    """A warning may quote what a model or a file says: it does not write the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
