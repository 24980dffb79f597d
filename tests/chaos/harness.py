"""A run of `python -m cluster train` under faults: its processes, its lines, its books.

inject/sitecustomize.py brings faults into its processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
WORKER, LEARNER, GCS = "ray::_RolloutActor", "ray::LearnerActor", "gcs_server"
WAIT_S = float(os.environ.get("ENGRAM_CHAOS_WAIT_S", "300"))
"""The longest wait of a trial; only a very busy machine needs more."""

Fault = Literal["engine", "refresh", "nan_reward", "nan_write"]

SETTINGS = (
    "train.tasks_per_step=2",
    "train.group_size=2",
    "train.checkpoint_every=2",
    "train.group_timeout_s=120",
    "rollout.episode_timeout_s=110",
    "warm_start.steps=0",
    "evaluation.tasks=1",
    "evaluation.bootstrap_samples=100",
    "evaluation.memory_off_row=false",
    "memory.max_extract_tokens=24",
    "sampling.max_answer_tokens=8",
    "learner.trainable_layers=3",
    "learner.threads=1",
    "rollout.threads=1",
    "engine.slots=4",
    "engine.kv_cache_gib=0.2",
    "ray.object_store_gib=0.3",
)


class ChaosError(AssertionError):
    """A promise was broken; the message says which, with the run's last lines."""


class Run:
    """A process of the run, read line by line while it lives.

    ``folder`` holds its MLflow store, checkpoints and audit.
    """

    def __init__(self, folder: Path, settings: Sequence[str], environment: Mapping[str, str] = {}) -> None:
        self.folder = folder
        self.lines: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.err"))) + 1
        self._errors, self._output = folder / f"{number}.err", folder / f"{number}.out"
        command = [
            sys.executable,
            "-m",
            "cluster",
            "train",
            "tests/quickstart.yaml",
            *SETTINGS,
            *settings,
            f"output_dir={folder / 'runs'}",
        ]
        surroundings = {**os.environ, **chaos_environment(folder), **environment}
        surroundings.pop("MLFLOW_TRACKING_URI", None)
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=surroundings
            )
        self.seen: set[tuple[int, str]] = set()
        self._more = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self._output.open("w") as output:
            for line in self.process.stdout:
                output.write(line)
                output.flush()
                with self._more:
                    self.lines.append(line.rstrip("\n"))
                    self._more.notify_all()
        with self._more:
            self._more.notify_all()

    def wait_for(self, pattern: str, after: int = 0) -> int:
        """Wait until a line from place ``after`` on matches. Returns the place behind it."""
        end = time.monotonic() + WAIT_S
        with self._more:
            while True:
                for place in range(after, len(self.lines)):
                    if re.search(pattern, self.lines[place]):
                        return place + 1
                over = self.process.poll() is not None
                if not self._more.wait(min(1.0, max(0.0, end - time.monotonic()))) and (
                    over or time.monotonic() > end
                ):
                    limit = "before the run ended" if over else f"within {WAIT_S:g} s"
                    raise ChaosError(f"no line like {pattern!r} {limit}: {self.tail()}")

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not reached():
            if self.process.poll() is not None or time.monotonic() > end:
                raise ChaosError(f"{what}: did not happen: {self.tail()}")
            time.sleep(0.05)

    def processes(self, title: str) -> list[int]:
        """The run's processes by title, or by the name of their program, oldest first."""
        self.look()
        commands = {pid: command_line(pid) for pid in descendants([self.process.pid])}
        return [
            pid
            for pid, command in commands.items()
            if command.startswith(title) or command.partition(" ")[0].endswith(f"/{title}")
        ]

    def look(self) -> None:
        """Remember which processes the run has."""
        self.seen |= {(pid, start) for pid in descendants([self.process.pid]) if (start := started(pid))}

    def kill(self, title: str, number: int = 0) -> int:
        """SIGKILL a process of that title. Returns its pid."""
        self.wait_until(lambda: len(self.processes(title)) > number, f"a process {title}")
        pid = self.processes(title)[number]
        os.kill(pid, signal.SIGKILL)
        return pid

    def inflict(self, fault: Fault) -> None:
        """Order a fault, and wait until a process has taken it."""
        (self.folder / f"fault.{fault}").touch()
        self.wait_until(lambda: any(self.folder.glob(f"done.{fault}.*")), f"the fault {fault}")

    def end(self) -> int:
        """Wait until the run and all of its processes have ended. Returns the exit status."""
        end = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            if time.monotonic() > end:
                self.destroy()
                raise ChaosError(f"the run did not end within {WAIT_S:g} s: {self.tail()}")
            self.look()
            time.sleep(0.2)
        while left := self.left():
            if time.monotonic() > end:
                self.destroy()
                raise ChaosError(f"processes outlive the run: {left}")
            time.sleep(0.2)
        return self.process.returncode

    def left(self) -> list[str]:
        return [f"{pid} {command_line(pid)[:60]}" for pid, start in self.seen if started(pid) == start]

    def destroy(self) -> None:
        """Kill what is left of the run."""
        self.look()
        for pid, start in self.seen | {(self.process.pid, started(self.process.pid))}:
            if start and started(pid) == start:
                with suppress(ProcessLookupError):  # it ended in between
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def one_line(self) -> str:
        """The error with which the run ended. Raises ChaosError when it is not one line."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        if len(lines) != 1 or "Traceback" in self.errors or "Unhandled error" in self.errors:
            raise ChaosError(f"the run did not end with one line: {self.errors[-3000:]}")
        return lines[0]

    def tail(self) -> str:
        return " | ".join([*self.lines[-6:], *self.errors.splitlines()[-4:]])


@dataclass(frozen=True)
class Books:
    """The last ledger line of a run's output."""

    issued: int
    settled: Mapping[str, int]
    in_flight: int
    reissued: int
    failed: Mapping[str, int]
    recovered: int
    restarted: int

    @staticmethod
    def of(lines: Iterable[str]) -> Books:
        line = next((line for line in reversed(list(lines)) if re.match(r"tasks: \d", line)), "")
        if not line or "DOES NOT BALANCE" in line:
            raise ChaosError(f"the ledger does not balance, or was not shown: {line!r}")
        tasks, _, episodes = line.partition("; failed episodes: ")
        settled = {
            fate: int(count) for count, fate in re.findall(r"(\d+) (trained|stale|failed|abandoned)", tasks)
        }
        failed = {boundary: int(count) for count, boundary in re.findall(r"(\d+) (\w+)", episodes)}
        again = re.search(r"\((\d+) episodes recovered, (\d+) restarted\)", tasks)
        books = Books(
            issued=_count(r"(\d+) issued", tasks),
            settled=settled,
            in_flight=_count(r"(\d+) in flight", tasks),
            reissued=_count(r"(\d+) re-issued", tasks),
            failed=failed,
            recovered=int(again[1]) if again else 0,
            restarted=int(again[2]) if again else 0,
        )
        if books.issued != sum(settled.values()) + books.in_flight:
            raise ChaosError(f"the ledger's line does not add up: {line}")
        return books


def _count(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text!r}"
    return int(match[1])


def checkpoint_state(folder: Path) -> dict[str, Any]:
    """The state of the newest checkpoint; {} without one."""
    files = sorted((folder / "runs").glob("*/checkpoints/step-*/state.json"))
    state: dict[str, Any] = json.loads(files[-1].read_text()) if files else {}
    return state


def check_finished(
    run: Run,
    steps: int,
    database: Path | None = None,
    max_staleness: int = 1,
    writes: bool = True,
    in_flight: bool = False,
) -> Books:
    """Check the promises to a run that has ended well.

    Nothing is lost, nothing wrong was trained on, no generation was under a wrong adapter, there is one
    MLflow run. ``in_flight``: episodes live through refreshes, so a group is as old as its oldest token.
    """
    promise(run.process.returncode == 0, f"it finishes: status {run.process.returncode}, {run.tail()}")
    books, state = Books.of(run.lines), checkpoint_state(run.folder)
    ledger = state["ledger"]
    promise((state["step"], len(state["rewards"])) == (steps, steps), f"all steps are made: {state}")
    settled = books.settled.get("trained") == 2 * steps and books.in_flight == 0
    promise(settled, f"each task is settled: {books}")
    same = ledger["settled"] == books.settled and not ledger["pending"]
    promise(same, f"the checkpoint has the same books: {ledger}")

    audit = audited(run.folder)
    promise(len(audit) >= 2 * steps, f"every group was audited: {len(audit)}")
    # Groups that outlived their learner are fresh, but versions that were lost lie in between.
    apart = max_staleness + state.get("lost_versions", 0)
    for group in audit:
        _check_group(group, apart, in_flight)
    promise(not writes or sum(group["revisions"] for group in audit) > 0, "episodes wrote")

    figures, runs, twice = stored(database or run.folder / "runs" / "mlflow.db")
    promise(not twice, f"MLflow holds each step once: {twice[:3]}")
    promise(max(figures["fast_weights/receipts_failed"]) == 0, "no generation was under a wrong adapter")
    promise(not writes or max(figures["fast_weights/receipts_passed"]) > 0, "and receipts were checked")
    statuses = [status for _, status in runs]
    promise(statuses == ["FINISHED"], f"there is one MLflow run, and it is ended: {runs}")
    return books


def _check_group(group: dict[str, Any], max_staleness: int, in_flight: bool) -> None:
    """A group that the learner trained on: of one version, with finite rewards, fresh."""
    if in_flight:
        dated = group["tokens"][0] == group["version"] and group["tokens"][-1] <= group["learner"]
        promise(dated, f"a group is as old as its oldest token: {group}")
    else:
        pure = group["episodes"] == group["segments"] == group["tokens"] == [group["version"]]
        promise(pure, f"a group is of one version: {group}")
    promise(group["finite"], f"every reward is a number: {group}")
    promise(0 <= group["learner"] - group["version"] <= max_staleness, f"a group is fresh: {group}")


def audited(folder: Path) -> list[dict[str, Any]]:
    """The groups that the learner trained on."""
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def stored(database: Path) -> tuple[dict[str, list[float]], list[tuple[str, str]], list[tuple[str, int]]]:
    """All metrics of an MLflow store by name, its runs with their status, and steps that it holds twice."""
    figures: dict[str, list[float]] = {}
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
        for key, value in store.execute("select key, value from metrics order by step"):
            figures.setdefault(key, []).append(value)
        runs = list(store.execute("select run_uuid, status from runs"))
        twice = "select key, step from metrics group by run_uuid, key, step having count(*) > 1"
        return figures, runs, list(store.execute(twice))


def promise(kept: bool, what: str) -> None:
    if not kept:
        raise ChaosError(what)


def chaos_environment(folder: Path) -> dict[str, str]:
    """The environment of the run and of nodes that it joins: faults, and no buffering of lines."""
    path = [str(Path(__file__).parent / "inject"), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {"ENGRAM_CHAOS": str(folder), "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def descendants(roots: Sequence[int]) -> list[int]:
    """The descendants of the processes ``roots``, by pid."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and (fields := _stat(int(path.name))):
            children.setdefault(int(fields[1]), []).append(int(path.name))
    pids, queue = list[int](), list(roots)
    while queue:
        below = children.get(queue.pop(), [])
        pids += below
        queue += below
    return sorted(pids)


def children(parent: int) -> list[int]:
    """The processes that ``parent`` has started itself and that live."""
    return [pid for pid in descendants([parent]) if _stat(pid)[1:2] == [str(parent)] and started(pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def started(pid: int) -> str:
    """When the process began, in the kernel's ticks. "" when it is gone, or a zombie.

    With the pid this is its identity.
    """
    fields = _stat(pid)
    return "" if not fields or fields[0] == "Z" else fields[19]


def _stat(pid: int) -> list[str]:
    """State, parent, ...: the fields of proc_pid_stat(5) from the third on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
