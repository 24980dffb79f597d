"""The long form of chaos, `make chaos`: seeded random faults at random times, and a table of the outcomes.

    python -m tests.chaos.trials --trials 20 --seed 0 --only node_lost --output chaos.md

Each trial is a whole training run on real parts (Ray, vLLM, the writer, DeepSpeed, MLflow; a tiny model)
that is struck once. It must finish. Where it cannot (driver, learner, disk) it must end with one line or a
kill, and `resume=auto` must take it to its end. harness.py checks what holds then.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.harness import (
    GCS,
    LEARNER,
    ROOT,
    WORKER,
    Books,
    Fault,
    Run,
    audited,
    check_finished,
    children,
    promise,
    stored,
)
from tests.chaos.scenes import Scene, judge_server, mlflow_server, three_nodes

STEPS = 8
IN_FLIGHT = ("rollout.refresh=in_flight", "objective.importance=truncated")


@dataclass(frozen=True)
class Kind:
    """A fault.

    ``ends``: whether the run must end by it and is resumed (None: it may). ``after`` checks what only this
    kind promises.
    """

    strike: Callable[[Run, Scene], None]
    ends: bool | None = False
    settings: tuple[str, ...] = ("rollout.workers=2",)
    around: Callable[[Scene], AbstractContextManager[object]] = nullcontext
    after: Callable[[Run, Books], None] = lambda run, books: None
    writes: bool = True
    in_flight: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    number: int
    kind: str
    at: str
    ended: str
    resumed: str
    issued: int
    reissued: int
    failed: int
    seconds: float
    verdict: str


def _kill_both(run: Run, scene: Scene) -> None:
    for pid in run.processes(WORKER):
        os.kill(pid, signal.SIGKILL)


def _inflict(fault: Fault) -> Callable[[Run, Scene], None]:
    return lambda run, scene: run.inflict(fault)


def _stop(run: Run, scene: Scene) -> None:
    """Let a worker hang: it is alive and answers nothing."""
    os.kill(run.processes(WORKER)[0], signal.SIGSTOP)


def _fill_disk(run: Run, scene: Scene) -> None:
    """Let the learner's rank write no file beyond a megabyte: its next checkpoint fails half-way."""
    (pid,) = run.processes(LEARNER)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**20, 2**20))


def _every_step_is_stored(run: Run, books: Books) -> None:
    figures, _, _ = stored(run.folder / "server.db")
    promise(
        len(figures["reward/mean"]) == STEPS,
        f"figures of the outage are filled in afterwards: {len(figures['reward/mean'])} of {STEPS} steps",
    )


def _failed(boundary: str) -> Callable[[Run, Books], None]:
    return lambda run, books: promise(
        books.failed.get(boundary, 0) >= 1, f"episodes failed by their {boundary}: {books.failed}"
    )


def _rolled_back(run: Run, books: Books) -> None:
    figures, _, _ = stored(run.folder / "runs" / "mlflow.db")
    taken_back, writes = figures["fast_weights/rolled_back"], figures["fast_weights/writes"]
    promise(
        max(taken_back) >= 1,
        f"the write whose gradient is no number is rolled back: {sum(taken_back):g} of {sum(writes):g} are",
    )


def _judged(run: Run, books: Books) -> None:
    """Episodes failed; when three groups in a row did, the run ended and said why."""
    said = run.errors if run.process.returncode else f"failed episodes: {books.failed.get('environment', 0)}"
    promise(
        "gave no answer in 2 s" in said or books.failed.get("environment", 0) >= 1,
        f"episodes failed by their deadline: {said}",
    )


def _reissued(run: Run, books: Books) -> None:
    promise(any(" is lost (" in line for line in run.lines), "the loss is said")


def _recovered(run: Run, books: Books) -> None:
    _reissued(run, books)
    promise(
        books.recovered + books.restarted >= 1,
        f"episodes that the lost worker had begun are gone on with: {books}",
    )


def _lived_through(run: Run, books: Books) -> None:
    _reissued(run, books)
    promise(
        any(len(group["tokens"]) > 1 for group in audited(run.folder)), "an episode lives through a refresh"
    )


def _came_back(run: Run, books: Books) -> None:
    said = [line for line in run.lines if line.startswith("the learner is lost (")]
    promise(len(said) == 1, f"the learner comes back once, and it is said: {said}")


def _act(run: Run, scene: Scene) -> None:
    scene.act()


KINDS: dict[str, Kind] = {
    "worker_killed": Kind(lambda run, scene: _none(run.kill(WORKER)), after=_reissued),
    "worker_killed_recovering": Kind(
        lambda run, scene: _none(run.kill(WORKER)),
        settings=("rollout.workers=2", "rollout.recover_episodes=true"),
        after=_recovered,
    ),
    "worker_killed_in_flight": Kind(
        lambda run, scene: _none(run.kill(WORKER)),
        settings=("rollout.workers=2", *IN_FLIGHT),
        after=_lived_through,
        in_flight=True,
    ),
    "all_workers_killed": Kind(_kill_both, after=_reissued),
    "engine_fails": Kind(_inflict("engine"), after=_reissued),
    "worker_hangs": Kind(_stop, settings=("rollout.workers=2", "rollout.health_s=3"), after=_reissued),
    "killed_in_refresh": Kind(_inflict("refresh"), after=_reissued),
    "learner_killed": Kind(lambda run, scene: _none(run.kill(LEARNER)), after=_came_back),
    "rank_of_two_killed": Kind(
        lambda run, scene: _none(run.kill(LEARNER, 1)), settings=("learner.workers=2",), after=_came_back
    ),
    "supervised_driver_killed": Kind(
        lambda run, scene: os.kill(children(run.process.pid)[0], signal.SIGKILL), settings=("--supervise=1",)
    ),
    "gcs_killed": Kind(lambda run, scene: _none(run.kill(GCS)), ends=True),
    "driver_killed": Kind(lambda run, scene: run.process.kill(), ends=True),
    "stopped_by_sigterm": Kind(lambda run, scene: run.process.terminate(), ends=True),
    "mlflow_killed": Kind(_act, around=mlflow_server, settings=(), after=_every_step_is_stored),
    "node_lost": Kind(_act, around=three_nodes, after=_reissued),
    "disk_full": Kind(_fill_disk, ends=None, settings=()),
    "small_object_store": Kind(
        lambda run, scene: None,
        settings=("rollout.workers=2", "ray.object_store_gib=0.08", "learner.trainable=full"),
    ),
    "nan_reward": Kind(_inflict("nan_reward"), settings=(), after=_failed("environment")),
    "nan_write": Kind(_inflict("nan_write"), settings=(), after=_rolled_back),
    "judge_hangs": Kind(_act, ends=None, around=judge_server, settings=(), after=_judged, writes=False),
}


def _none(value: object) -> None:
    """Drop the result of a strike."""


def play(number: int, name: str, draw: random.Random, model: Path, folder: Path) -> Row:
    """Play a trial of the fault ``name``. Its row says what became of it."""
    kind, began = KINDS[name], time.monotonic()
    at = draw.randint(3, STEPS - 3)  # the first checkpoint is of step 2; before it a run starts anew
    delay = round(draw.uniform(0, 1.5), 1)
    scene, ended, resumed, books, verdict = Scene(folder), "-", "-", Books(0, {}, 0, 0, {}, 0, 0), "ok"
    folder.mkdir(parents=True)
    runs: list[Run] = []
    try:
        with kind.around(scene):
            settings = [f"model.name={model}", f"train.steps={STEPS}", *kind.settings, *scene.settings]
            run = Run(folder, settings, scene.environment)
            runs.append(run)
            run.wait_for(f"^train step {at}/")
            time.sleep(delay)
            run.look()
            kind.strike(run, scene)
            status = run.end()
            ended = "finished" if status == 0 else "killed" if status < 0 else f"status {status}"
            promise(
                kind.ends is None or kind.ends == (status != 0),
                f"it {'ends' if kind.ends else 'goes on'}: {ended}, {run.tail()}",
            )
            if status == 1:
                run.one_line()
            if status != 0:
                run = Run(folder, [*settings, "resume=auto"], scene.environment)
                runs.append(run)
                resumed = "finished" if run.end() == 0 else "failed"
            books = check_finished(run, STEPS, scene.database, writes=kind.writes, in_flight=kind.in_flight)
            kind.after(runs[0], books)
    except Exception as error:  # it is the verdict of this trial: others are still to be played
        verdict = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        for run in runs:
            run.destroy()
    failed = sum(books.failed.values())
    return Row(
        number,
        name,
        f"step {at} + {delay} s",
        ended,
        resumed,
        books.issued,
        books.reissued,
        failed,
        time.monotonic() - began,
        verdict,
    )


HEADER = (
    "#",
    "fault",
    "struck at",
    "the run",
    "resumed",
    "tasks",
    "re-issued",
    "failed episodes",
    "seconds",
    "verdict",
)


def cells(row: Row) -> list[str]:
    return [str(value) if not isinstance(value, float) else f"{value:.0f}" for value in vars(row).values()]


def markdown(rows: list[Row], seed: int) -> str:
    good = sum(row.verdict == "ok" for row in rows)
    lines = [
        f"# Chaos: {good} of {len(rows)} runs finish or resume (seed {seed})",
        "",
        f"| {' | '.join(HEADER)} |",
        "|---" * len(HEADER) + "|",
    ]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells(row))} |" for row in rows]
    promises = (
        "all tasks accounted for, groups of one version each (in flight: as old as their oldest token), "
        "no failed receipt and one MLflow run"
    )
    lines += ["", f"Each finished with {promises}."] if good else []
    return "\n".join(lines) + "\n"


def choose(trials: int, draw: random.Random) -> list[str]:
    """Choose kinds in random order, each once before any comes again."""
    chosen: list[str] = []
    while len(chosen) < trials:
        chosen += draw.sample(sorted(KINDS), len(KINDS))
    return chosen[:trials]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.trials", description="Training runs under random faults."
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", choices=sorted(KINDS), default=[], help="these faults, once each"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "chaos.md")
    options = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from configs.models import resolve_model
    from configs.schema import ModelConfig
    from tests.conftest import write_tiny_model

    console, rows = Console(width=None if sys.stdout.isatty() else 200), list[Row]()
    names = options.only or choose(options.trials, random.Random(options.seed))
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    (base / "model").mkdir()
    model = write_tiny_model(resolve_model(ModelConfig()).path, base / "model")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, start=1):
        draw = random.Random(f"{options.seed}/{number}")
        row = play(number, name, draw, model, base / f"{number:02d}-{name}")
        rows.append(row)
        outcome = f"{row.ended}, resumed: {row.resumed}, {row.seconds:.0f} s: {row.verdict}"
        console.print(f"{number}/{len(names)} {name}, {row.at}: {outcome}", markup=False)
        options.output.write_text(markdown(rows, options.seed), encoding="utf-8")
    good = sum(row.verdict == "ok" for row in rows)
    table = Table(*HEADER, title=f"{good} of {len(rows)} runs finish or resume")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(f"table: {options.output}")
    if good < len(rows):
        console.print(f"the trials' folders: {base}")
        return 1
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
