"""A real S3 server on loopback, which can be away; machines with own disks; a run with checkpoints."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from cluster.common.folders import output_folder
from cluster.runs.checkpoint import START, Checkpoint, save_checkpoint
from cluster.runs.from_store import bring_unfinished, newest_number
from cluster.runs.mirror import Mirror
from cluster.runs.resume import find_unfinished
from cluster.runs.run_files import files_of
from cluster.runs.run_folders import create_run
from cluster.runs.store import Manifest, Store, StoredRun
from configs.files import write_text
from configs.load import load_config, to_yaml
from configs.schema import RunConfig

KEYS = {"AWS_ACCESS_KEY_ID": "AKIA-OF-THE-TEST", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-test"}
ENVIRONMENT = {**KEYS, "AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1"}
BUCKET = "bucket"
# moto keeps what it has in memory: a server that is away is one that refuses connections meanwhile
_SERVER = """
import signal, sys
from moto.server import ThreadedMotoServer
import boto3

port = int(sys.argv[1])
server = None

def start(*_):
    global server
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()

def stop(*_):
    server.stop()

start()
client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
client.create_bucket(Bucket=sys.argv[2])
print("up", flush=True)
for line in sys.stdin:
    stop() if line.strip() == "stop" else start()
    print("done", flush=True)
"""


@dataclass
class S3Server:
    """``url``: of a folder in its bucket. ``away`` and ``back``: it refuses connections in between."""

    port: int = 0
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(self.port), BUCKET],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        assert self._line() == "up"

    @property
    def url(self) -> str:
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http"
        return f"s3://{BUCKET}/runs?{options}"

    def away(self) -> None:
        self._tell("stop")

    def back(self) -> None:
        self._tell("start")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self._line() == "done"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


class Disk:
    """A mounted disk as a store."""

    def __init__(self, folder: Path) -> None:
        self.url = f"file://{folder}"


class Silent:
    """A store that takes connections and says nothing, until it is closed."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = (
            f"s3://{BUCKET}/runs?endpoint_override=127.0.0.1:{self._listener.getsockname()[1]}&scheme=http"
        )

    def close(self) -> None:
        """All that waits for it fails now."""
        self._listener.close()


class HasUrl(Protocol):
    """A store."""

    @property
    def url(self) -> str: ...


class Machine:
    """A machine with a disk of its own; all machines of a test use one folder of the store."""

    def __init__(self, server: HasUrl, tmp_path: Path, name: str) -> None:
        place, mark, options = server.url.partition("?")
        self.url = f"{place}/{tmp_path.name}{mark}{options}"
        work = f"store.work_dir={tmp_path / name}"
        words = ["name=trial", "train.steps=10", f"output_dir={self.url}", work, "store.timeout_s=20"]
        self.config: RunConfig = load_config(Path("tests/quickstart.yaml"), words)
        self.said: list[str] = []

    @property
    def stored(self) -> Store:
        return Store(self.url, 20.0)

    def begin(self, name: str = "trial") -> Path:
        run = create_run(output_folder(self.config), name, newest_number(self.config, name))
        write_text(run / "config.yaml", to_yaml(self.config))
        (run / "evaluation").mkdir()
        write_text(run / "evaluation" / "before.json", "a row")
        return run

    def mirror(self, run: Path) -> Mirror:
        mirror = Mirror(self.stored.run(run.name), run, self.said.append)
        mirror.start()
        return mirror

    def put(self, run: Path) -> None:
        self.mirror(run).close(200)
        assert self.said[-1].startswith("stored:"), self.said

    def resumed(self) -> Checkpoint | Path | None:
        """What ``resume=auto`` goes on from."""
        bring_unfinished(self.config)
        return find_unfinished(output_folder(self.config), self.config)


def save(run: Path, step: int, content: str = "", keep: int = 2) -> Path:
    async def write(target: Path) -> None:
        (target / "model").mkdir(parents=True)
        for name in ("model/model.safetensors", "optimizer.safetensors"):
            (target / name).write_text(f"{name} of step {step} {content} " * 100)
        (target / "model" / "tokenizer.json").write_text("the same in every step" * 100)

    state = replace(START, step=step, version=step)
    return asyncio.run(save_checkpoint(run, state, "name: trial\n", write, keep)).folder


def contents(run: Path) -> dict[str, bytes]:
    return {path: (run / path).read_bytes() for path in files_of(run)}


def stored(machine: Machine, run: Path) -> tuple[StoredRun, Manifest]:
    there = machine.stored.run(run.name)
    manifest = there.newest()
    assert manifest is not None
    return there, manifest
