"""A process that puts a run into a store is killed at each file: nothing torn is believed or lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runs.checkpoint import newest_whole
from cluster.runs.run_files import files_of
from configs.files import write_text
from tests.unit.store_cases import ENVIRONMENT, Machine, S3Server, save, stored


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


_UPLOADER = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from pyarrow import fs
from cluster.runs import mirror, store

left, real_open, real_delete = 0, store.opened, store.StoredRun.delete

def strike():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Dying:
    def __init__(self, file):
        self.file = file

    def write(self, chunk):
        self.file.write(chunk[: len(chunk) // 2])
        strike()  # with half of it on its way
        self.file.write(chunk[len(chunk) // 2 :])

@contextmanager
def opened(filesystem, place):
    strike()  # before it
    with real_open(filesystem, place) as file:
        yield Dying(file)
    strike()  # after it, before anything else

def delete(self, digests):
    for digest in digests:
        strike()
        real_delete(self, {digest})

store.opened, store.StoredRun.delete, mirror._AT_ONCE = opened, delete, 1
for line in sys.stdin:  # a fork for each life: what is imported is imported once, and S3 is not begun yet
    url, run, left = line.split()
    left = int(left)
    child = os.fork()
    if child == 0:
        copy = mirror.Mirror(store.Store(url, 20.0).run(Path(run).name), Path(run), lambda text: None)
        copy.start()
        copy.close(200)
        os._exit(0 if copy._complete else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Uploader:
    """Puts runs into stores, each in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _UPLOADER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path.cwd())},
        )

    def put(self, machine: Machine, run: Path, dies_at: int) -> bool:
        """Put the run; the process is killed at its file boundary ``dies_at``. Whether it came so far."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(machine.url, run, dies_at, file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        assert status in (0, -signal.SIGKILL)
        return status != 0


@pytest.fixture(scope="module")
def uploader() -> Iterator[Uploader]:
    uploader = Uploader()
    yield uploader
    uploader.process.kill()
    uploader.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "file"])
def test_a_kill_in_mid_upload_loses_nothing(
    kind: str, server: S3Server, uploader: Uploader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file boundary, and in the middle of each file: what was there before, or what is new."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    machine = Machine(server, tmp_path, "first")
    if kind == "file":
        machine.url = f"file://{tmp_path}/disk"
    run = machine.begin()
    save(run, 2)
    write_text(run / "evaluation" / "before.json", "a row of step 2")
    machine.put(run)
    for dies_at in range(1, 100):
        # every life has something new: the next step, a row that is written anew, one more to delete
        step = 2 + 2 * dies_at
        save(run, step, keep=1)
        write_text(run / "evaluation" / "before.json", f"a row of step {step}")
        died = uploader.put(machine, run, dies_at)
        there, manifest = stored(machine, run)
        taken = tmp_path / f"taken-{dies_at}"
        there.take(manifest, taken)
        found = newest_whole(taken)
        assert found is not None and found.state.step in ((step - 2, step) if died else (step,))
        assert set(files_of(taken)) == set(manifest.files)  # no checkpoint was passed over
        row = (taken / "evaluation" / "before.json").read_text()
        assert row in (f"a row of step {step - 2}", f"a row of step {step}")
        shutil.rmtree(taken)
        if not died:
            assert there.blobs() == {content.sha256 for content in manifest.files.values()}
            break
        machine.put(run)  # the next life puts the rest, and leaves nothing over
    assert not died and dies_at >= 20
