"""The long form, `make chaos`: seeded random faults at seeded random times, one run each, and a table of what became of them.

    python -m tests.chaos.trials --trials 20 --seed 0 --only node_lost --output chaos.md

Each trial is a whole training run on real parts (Ray, vLLM, the writer, DeepSpeed, MLflow; a tiny model) that is struck once. It must finish; where
that cannot be (driver, learner, disk) it must end with one line or a kill, and `resume=auto` must take it to its end. What holds then: harness.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.chaos.harness import (
    LEARNER,
    ROOT,
    WAIT_S,
    WORKER,
    Books,
    Fault,
    Run,
    audited,
    chaos_environment,
    check_finished,
    promise,
    stored,
)

STEPS = 8
IN_FLIGHT = ("rollout.refresh=in_flight", "objective.importance=truncated")


@dataclass(eq=False)
class Scene:
    """What one trial plays in. ``settings`` of its surroundings; ``database`` of a store that is not the run's own; ``act`` is theirs to strike."""

    folder: Path
    settings: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    database: Path | None = None
    act: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Kind:
    """A fault. ``ends``: whether the run has to end by it (None: it may) and is resumed; ``after`` looks at what only this kind promises."""

    strike: Callable[[Run, Scene], None]
    ends: bool | None = False
    settings: tuple[str, ...] = ("rollout.workers=2",)
    around: Callable[[Scene], AbstractContextManager[object]] = nullcontext
    after: Callable[[Run, Books], None] = lambda run, books: None
    writes: bool = True
    in_flight: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table."""

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
    """A worker that hangs: alive, and deaf."""
    os.kill(run.processes(WORKER)[0], signal.SIGSTOP)


def _fill_disk(run: Run, scene: Scene) -> None:
    """The learner's rank can write no file larger than a megabyte: its next checkpoint fails half-way."""
    (pid,) = run.processes(LEARNER)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**20, 2**20))


@contextmanager
def _mlflow(scene: Scene) -> Iterator[None]:
    """A server that the strike kills, and another that takes its place a few seconds later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scene.database = scene.folder / "server.db"
    address = f"http://127.0.0.1:{port}"
    store = [
        "--backend-store-uri",
        f"sqlite:///{scene.database}",
        "--default-artifact-root",
        str(scene.folder / "artifacts"),
    ]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *store,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    servers: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (scene.folder / "mlflow.log").open("a") as log:
            servers.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            )

    def kill() -> None:
        os.killpg(servers[-1].pid, signal.SIGKILL)
        servers[-1].wait()

    def outage() -> None:
        kill()
        time.sleep(5)
        start()

    start()
    try:
        _answers(f"{address}/health")
        scene.settings.append(f"tracking.uri={address}")
        scene.act = outage
        yield
    finally:
        kill()


def _answers(address: str) -> None:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, OSError):
            promise(time.monotonic() < end, f"{address} answers")
            time.sleep(0.3)
        else:
            return


def _every_step_is_stored(run: Run, books: Books) -> None:
    figures, _ = stored(run.folder / "server.db")
    promise(
        len(figures["reward/mean"]) == STEPS,
        f"figures of the outage are filled in afterwards: {len(figures['reward/mean'])} of {STEPS} steps",
    )


@contextmanager
def _nodes(scene: Scene) -> Iterator[None]:
    """Three nodes: the learner fits on the first alone, a rollout worker on each of the others. The strike takes one away and brings another."""
    environment = {
        **chaos_environment(scene.folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    from ray.cluster_utils import Cluster

    store = 200 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": store},
    )
    try:
        nodes = [cluster.add_node(num_cpus=2, object_store_memory=store) for _ in range(2)]

        def lose() -> None:
            cluster.remove_node(nodes[0], allow_graceful=False)
            cluster.add_node(num_cpus=2, object_store_memory=store)

        scene.settings += [
            f"ray.address={cluster.address}",
            "rollout.cpus_per_worker=2",
            "learner.cpus_per_worker=1",
        ]
        scene.act = lose
        yield
    finally:
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _judge(scene: Scene) -> Iterator[None]:
    """A judge that decides at random, and from the strike on answers nobody for ten seconds."""
    silent_until = [0.0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(
                json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1]["content"]
            )
            time.sleep(max(0.0, silent_until[0] - time.monotonic()))
            met = random.Random(asked["answer"]).random() < 0.5
            verdicts = [
                {"rubric": rubric["rubric"], "reason": "drawn", "met": met} for rubric in asked["rubrics"]
            ]
            content = json.dumps({"id": asked["id"], "verdicts": verdicts})
            body = json.dumps(
                {
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": content},
                            "finish_reason": "stop",
                        }
                    ]
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Who waits no longer has hung up."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def fall_silent() -> None:
        silent_until[0] = time.monotonic() + 10

    judge = f"environment.rubric.judge.url=http://127.0.0.1:{server.server_port}/v1"
    scene.settings += [
        "environment.name=rubric",
        f"environment.rubric.path={ROOT / 'tests/data/rubric_sample.jsonl'}",
        judge,
    ]
    scene.settings += [
        "environment.rubric.judge.model=m",
        "environment.rubric.judge.timeout_s=2",
        "environment.rubric.judge.retries=0",
    ]
    scene.settings += ["engine.max_model_tokens=2048", "memory.max_context_tokens=1024"]
    scene.act = fall_silent
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _failed(boundary: str) -> Callable[[Run, Books], None]:
    return lambda run, books: promise(
        books.failed.get(boundary, 0) >= 1, f"episodes failed by their {boundary}: {books.failed}"
    )


def _rolled_back(run: Run, books: Books) -> None:
    figures, _ = stored(run.folder / "runs" / "mlflow.db")
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
    "learner_killed": Kind(lambda run, scene: _none(run.kill(LEARNER)), ends=True),
    "rank_of_two_killed": Kind(
        lambda run, scene: _none(run.kill(LEARNER, 1)), ends=True, settings=("learner.workers=2",)
    ),
    "driver_killed": Kind(lambda run, scene: run.process.kill(), ends=True),
    "stopped_by_sigterm": Kind(lambda run, scene: run.process.terminate(), ends=True),
    "mlflow_killed": Kind(_act, around=_mlflow, settings=(), after=_every_step_is_stored),
    "node_lost": Kind(_act, around=_nodes, after=_reissued),
    "disk_full": Kind(_fill_disk, ends=None, settings=()),
    "small_object_store": Kind(
        lambda run, scene: None,
        settings=("rollout.workers=2", "ray.object_store_gib=0.08", "learner.trainable=full"),
    ),
    "nan_reward": Kind(_inflict("nan_reward"), settings=(), after=_failed("environment")),
    "nan_write": Kind(_inflict("nan_write"), settings=(), after=_rolled_back),
    "judge_hangs": Kind(_act, ends=None, around=_judge, settings=(), after=_judged, writes=False),
}


def _none(value: object) -> None:
    """For a strike whose result is of no use."""


def play(number: int, name: str, draw: random.Random, model: Path, folder: Path) -> Row:
    kind, began = KINDS[name], time.monotonic()
    at, delay = (
        draw.randint(3, STEPS - 3),
        round(draw.uniform(0, 1.5), 1),
    )  # the first checkpoint is of step 2; before it a run starts anew
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
    except (
        Exception
    ) as error:  # whatever it is, it is this trial's verdict: the others of the hour are still to be played
        verdict = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        for one in runs:
            one.destroy()
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
    promises = "all tasks accounted for, groups of one version each (in flight: as old as their oldest token), no failed receipt and one MLflow run"
    lines += ["", f"Each finished with {promises}."] if good else []
    return "\n".join(lines) + "\n"


def choose(trials: int, draw: random.Random) -> list[str]:
    """Every kind once before any comes again, in random order."""
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

    draw, console, rows = (
        random.Random(options.seed),
        Console(width=None if sys.stdout.isatty() else 200),
        list[Row](),
    )
    names = options.only or choose(options.trials, draw)
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    (base / "model").mkdir()
    model = write_tiny_model(resolve_model(ModelConfig()).path, base / "model")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, start=1):
        row = play(
            number, name, random.Random(f"{options.seed}/{number}"), model, base / f"{number:02d}-{name}"
        )
        rows.append(row)
        console.print(
            f"{number}/{len(names)} {name}, {row.at}: {row.ended}, resumed: {row.resumed}, {row.seconds:.0f} s: {row.verdict}",
            markup=False,
        )
        options.output.write_text(markdown(rows, options.seed), encoding="utf-8")
    table = Table(
        *HEADER, title=f"{sum(row.verdict == 'ok' for row in rows)} of {len(rows)} runs finish or resume"
    )
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(f"table: {options.output}")
    bad = any(row.verdict != "ok" for row in rows)
    if bad:
        console.print(f"the trials' folders: {base}")
    else:
        shutil.rmtree(base)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
