"""Addresses of stores: no credential is taken, shown or kept."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.common.folders import output_folder
from cluster.runs import store
from cluster.runs.from_store import local_copy
from cluster.runs.store import StoreError
from configs.bounds import BoundError, ConfigError
from configs.load import load_config, to_yaml
from tests.unit.store_cases import KEYS, Machine, S3Server, contents, save, stored
from tests.unit.test_store import keys, server

__all__ = ["keys", "server"]  # fixtures
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA:s3cr3t@bucket/runs",
        "s3://AKIA:s3/cr3t@bucket/runs",
        "s3://bucket/runs?access_key=s3cr3t",
        "gs://bucket/runs?access_token=s3cr3t",
        "abfs://s3cr3t@host/x",
        "s3://AKIA%3As3cr3t%40bucket/runs",
        "s3://bucket/runs?endpoint_override=AKIA:s3cr3t%40host",
        "s3://bucket/../s3cr3t",
        "file://s3cr3t/x",
        "http://s3cr3t/x",
        "s3:///s3cr3t",
    ],
)
def test_an_address_with_a_credential_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises((BoundError, ConfigError)) as caught:
        load_config(Path("tests/quickstart.yaml"), [f"output_dir={address}"])
    assert "s3cr3t" not in str(caught.value) and "output_dir" in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"the address \(hidden\) is not allowed.*never from an address"
    ) as caught:
        local_copy(address, weights=False)
    assert "s3cr3t" not in str(caught.value)


def test_a_command_does_not_show_a_credential() -> None:
    words = [sys.executable, "-m", "cluster", "inspect", "s3://AKIA:s3cr3t@bucket/runs/trial"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "(hidden) is not allowed" in done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr


def test_no_credential_is_in_anything(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    machine = Machine(server, tmp_path, "first")
    run = machine.begin()
    save(run, 2)
    machine.put(run)
    server.away()
    try:
        with pytest.raises(StoreError) as caught:
            machine.resumed() if shutil.rmtree(run) is None else None
    finally:
        server.back()
    there, manifest = stored(machine, run)
    texts = [*machine.said, caplog.text, str(caught.value), to_yaml(machine.config), repr(manifest)]
    there.take(manifest, tmp_path / "taken")
    texts += [content.decode() for content in contents(tmp_path / "taken").values()]
    for secret in KEYS.values():
        assert not [text for text in texts if secret in text]


def test_what_a_store_says_is_shown_without_the_key() -> None:
    said = f"the key {KEYS['AWS_ACCESS_KEY_ID']} with {KEYS['AWS_SECRET_ACCESS_KEY']} is unknown"
    shown = r"the key \(AWS_ACCESS_KEY_ID\) with \(AWS_SECRET_ACCESS_KEY\)"
    with pytest.raises(StoreError, match=shown), store._asking("s3://bucket"):
        raise OSError(said)


def test_the_local_folder_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))

    def folder(*words: str) -> Path:
        return output_folder(load_config(Path("tests/quickstart.yaml"), list(words)))

    assert folder("output_dir=s3://bucket/a/b") == tmp_path / "runs/s3/bucket/a/b"
    assert folder("output_dir=s3://bucket/a/b", "store.work_dir=/fast/runs") == Path("/fast/runs")
    here = folder("output_dir=s3://bucket/a?endpoint_override=here:1")
    assert here != folder("output_dir=s3://bucket/a?endpoint_override=there:1")
    assert folder(f"output_dir={tmp_path}/runs") == tmp_path / "runs"
