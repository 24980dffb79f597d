"""Starts a training whose process died again, from its last checkpoint, until it ends by itself.

    engram train CONFIG --supervise N:  this process --> the same command without --supervise, as a child
        0 done, 2 a user's mistake, 130 stopped --> the end
        anything else                           --> what is left of it is ended, a pause, then again

This process imports neither torch nor Ray: it is small, and what kills a training spares it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from cluster.common.folders import output_folder
from cluster.common.patience import backoff_s
from cluster.common.processes import is_alive
from cluster.runs.checkpoint import list_checkpoints
from cluster.runs.from_store import named_here
from cluster.runs.resume import names_a_checkpoint
from cluster.runs.run_folders import FINISHED, finished_steps, runs_of
from cluster.runs.run_lock import last_taken
from configs.schema import RunConfig
from configs.store_url import is_url

_DONE, _USAGE, _INTERRUPTED = 0, 2, 130
_POLL_S = 0.1
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


@dataclass(slots=True)
class Supervisor:
    """One training and its lives. ``command`` runs it; the settings of a life follow."""

    command: Sequence[str]
    settings: Sequence[str]
    config: RunConfig
    restarts: int
    say: Callable[[str], None]
    grace_s: float = 10.0  # for Ray's processes to notice by themselves that their driver is gone
    _child: subprocess.Popen[bytes] | None = None
    _stops: int = 0  # signals that asked for the end
    _run: Path | None = None  # the folder of our run, once a life had one
    _saved_before: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        self._saved_before = self._saved()

    def run(self) -> int:
        """Run the training to its end. Returns its exit status; that of its last life where it died."""
        _adopt_orphans()
        with self._forwarding():
            for restart in range(self.restarts + 1):
                before = self._locks()
                status = self._live([*self.command, *(self._resuming() if restart else self.settings)])
                _end_descendants(self.grace_s)
                if self._stops:
                    return _INTERRUPTED
                if status in (_DONE, _USAGE, _INTERRUPTED):
                    return status
                died = f"the training's process died ({_cause(status)})"
                self._run = self._run_of_child(before) or self._run
                if self._run is not None and self._is_done(self._run):
                    self.say(f"{died} after its end: {self._run} is finished")
                    return _DONE
                if restart == self.restarts:
                    self.say(f"{died}, and {self.restarts} restart(s) were allowed: it is not started again")
                    return status if status > 0 else 128 - status
                pause = backoff_s(restart + 2)
                self.say(f"{died}: restart {restart + 1} of {self.restarts} in {pause:g} s")
                if not self._wait(pause):
                    return _INTERRUPTED
        raise AssertionError("the last life returns")

    def _live(self, command: Sequence[str]) -> int:
        # In a process group of its own: a terminal's Ctrl-C, or a job's stop, comes once, and through us.
        # There is no other thread that could hold a lock at the fork.
        self._child = subprocess.Popen(command, process_group=0, preexec_fn=_die_with_parent)  # noqa: PLW1509
        if self._stops:  # the signal came before there was a child
            self._child.terminate()
        return self._child.wait()

    def _resuming(self) -> list[str]:
        """The settings of a life that goes on with the run of the one before.

        They name that run: auto might find another of its name, older and unfinished, or at work. Where the
        user went back to a checkpoint, they name the newest: the run may have been finished before.
        """
        resume = self._run
        if names_a_checkpoint(self.config.resume):
            saved = self._saved()
            resume = saved[0] if saved != self._saved_before else None
        if resume is None:  # it died before it had a folder, or saved anything beyond what is named
            return [*self.settings]
        return [*(word for word in self.settings if not word.startswith("resume=")), f"resume={resume}"]

    def _saved(self) -> list[Path]:
        """The newest checkpoint of the run in which ``resume`` names one; empty where it names none."""
        if not names_a_checkpoint(self.config.resume):
            return []
        return list_checkpoints(named_here(self.config).parent.parent)[-1:]

    def _run_of_child(self, before: Mapping[Path, tuple[int, int] | None]) -> Path | None:
        """The folder in which the last life worked, if it had one. ``before``: the locks of that time."""
        for run, taken in self._locks().items():
            # A pid alone may be that of a process of long ago.
            if taken and self._child and taken[0] == self._child.pid and taken != before.get(run):
                return run
        return None

    def _locks(self) -> dict[Path, tuple[int, int] | None]:
        """Who took the lock of each run that may be ours."""
        runs = runs_of(output_folder(self.config), self.config.name)
        if self.config.resume not in ("", "auto"):
            named = named_here(self.config)
            runs = [named, named.parent.parent, *runs]
        return {run: last_taken(run) for run in runs}

    def _is_done(self, run: Path) -> bool:
        """Whether the last life finished ``run``. What a store lacks of it, another life puts there."""
        taken = last_taken(run)
        return (
            not is_url(self.config.output_dir)
            and finished_steps(run) >= self.config.train.steps
            and taken is not None
            and (run / FINISHED).stat().st_mtime_ns >= taken[1]  # else an earlier training did
        )

    def _wait(self, seconds: float) -> bool:
        """Wait. Returns False where somebody asked for the end meanwhile."""
        end = time.monotonic() + seconds
        while not self._stops and time.monotonic() < end:
            time.sleep(_POLL_S)
        return not self._stops

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Hand SIGINT and SIGTERM to the training as SIGTERM; a second one kills it."""

        def forward(number: int, frame: FrameType | None) -> None:
            self._stops += 1
            if self._child is not None and self._child.poll() is None:
                self._child.terminate() if self._stops == 1 else self._child.kill()

        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, forward) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


def this_command(words: Sequence[str]) -> list[str]:
    """The command that started this process, without its ``words``: ``python -m cluster``, or a script."""
    given = sys.orig_argv[1 : len(sys.orig_argv) - len(words)]
    return [sys.executable, *given]


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


# --- what is left of a dead training ------------------------------------------------------------------------


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere Ray's own processes end by themselves, a little later."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    """In the child: save and end when this process is killed."""
    _prctl(_SET_PDEATHSIG, signal.SIGTERM)


def _adopt_orphans() -> None:
    """Become the parent of what the child leaves behind: of Ray's processes, whose driver is gone."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _end_descendants(grace_s: float) -> None:
    """Wait until all processes of the child have ended, and kill those that do not within ``grace_s``."""
    end = time.monotonic() + grace_s
    while (processes := _descendants()) and time.monotonic() < end + grace_s:
        if time.monotonic() > end:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(_POLL_S)


def _descendants() -> list[psutil.Process]:
    """The living processes below this one. Those that have ended are reaped."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [process for process in psutil.Process().children(recursive=True) if is_alive(process)]
