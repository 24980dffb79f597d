"""Surroundings of a trial that can be struck: an MLflow server, a cluster of nodes, a judge."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.chaos.harness import ROOT, WAIT_S, chaos_environment, promise


@dataclass(eq=False)
class Scene:
    """The surroundings of a trial.

    ``settings`` lead the run to them; ``database`` is a store that is not the run's own; ``act`` strikes
    them.
    """

    folder: Path
    settings: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    database: Path | None = None
    act: Callable[[], None] = lambda: None


@contextmanager
def mlflow_server(scene: Scene) -> Iterator[None]:
    """An MLflow server that the strike kills; another takes its place a few seconds later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scene.database = scene.folder / "server.db"
    address = f"http://127.0.0.1:{port}"
    options = {
        "backend-store-uri": f"sqlite:///{scene.database}",
        "default-artifact-root": str(scene.folder / "artifacts"),
        "host": "127.0.0.1",
        "port": str(port),
        "workers": "1",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "mlflow", "server", *flags]
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
        _wait_for_answer(f"{address}/health")
        scene.settings.append(f"tracking.uri={address}")
        scene.act = outage
        yield
    finally:
        kill()


def _wait_for_answer(address: str) -> None:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, OSError):
            promise(time.monotonic() < end, f"{address} answers")
            time.sleep(0.3)
        else:
            return


@contextmanager
def three_nodes(scene: Scene) -> Iterator[None]:
    """Three nodes: the learner fits on the first only, a rollout worker on each of the others.

    The strike removes a node and adds another.
    """
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
def judge_server(scene: Scene) -> Iterator[None]:
    """A judge that decides at random. The strike silences it for ten seconds."""
    silent_until = [0.0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = json.loads(request["messages"][1]["content"])
            time.sleep(max(0.0, silent_until[0] - time.monotonic()))
            met = random.Random(asked["answer"]).random() < 0.5
            verdicts = [
                {"rubric": rubric["rubric"], "reason": "drawn", "met": met} for rubric in asked["rubrics"]
            ]
            content = json.dumps({"id": asked["id"], "verdicts": verdicts})
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: a client that gave up has closed the connection."""

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
