"""A run's copy in Google's store: its own client, signed in by a service account, a server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.common.errors import AllFinished
from cluster.runs.checkpoint import Checkpoint
from cluster.runs.run_folders import mark_finished
from cluster.runs.store import Store, StoreError
from tests.unit.google_store import GoogleServer
from tests.unit.store_cases import Machine, contents, save, stored

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleServer]:
    server = GoogleServer(tmp_path_factory.mktemp("google"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def account(server: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(server.key))


def test_an_empty_machine_goes_on_with_the_run(server: GoogleServer, tmp_path: Path) -> None:
    first, second = (Machine(server, tmp_path, name) for name in ("first", "second"))
    run = first.begin()
    for step in (2, 4, 6):  # the first is pruned here, and there
        save(run, step)
        first.put(run)
    (run / "large.bin").write_bytes(bytes(range(256)) * 36_000)  # 9 MB go there in several parts
    first.put(run)
    there, manifest = stored(first, run)
    assert there.blobs() == {content.sha256 for content in manifest.files.values()}  # nothing is left over
    found = second.resumed()
    assert isinstance(found, Checkpoint) and found.state.step == 6
    assert contents(found.run_dir) == contents(run)
    save(found.run_dir, 8)
    second.put(found.run_dir)
    again = first.resumed()
    assert isinstance(again, Checkpoint) and again.state.step == 8
    mark_finished(run, 10)
    first.put(run)
    with pytest.raises(AllFinished):
        Machine(server, tmp_path, "third").resumed()


def test_a_key_that_is_none_is_one_line_that_does_not_show_it(
    server: GoogleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = json.loads(server.key.read_text())
    broken = tmp_path / "broken.json"
    secret = key["private_key"].replace("\n", "")
    broken.write_text(json.dumps({**key, "private_key": secret}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(broken))
    with pytest.raises(StoreError) as caught:
        Store(server.url, 2.0).runs()
    line = str(caught.value)
    assert line.startswith("gs://bucket/runs") and "\n" not in line and len(line) < 600
    assert secret[100:130] not in line
