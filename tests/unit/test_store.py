"""A run's copy in a store: a real S3 server on loopback, kills in the middle, a server that is away."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.common.display import Display
from cluster.common.errors import AllFinished, ClusterError
from cluster.runs import store
from cluster.runs.checkpoint import START, Checkpoint, load_whole, newest_whole
from cluster.runs.from_store import bring_named, local_copy
from cluster.runs.mirror import mirrored
from cluster.runs.run_files import files_of
from cluster.runs.run_folders import mark_finished
from cluster.runs.store import DamagedError, Store, StoredFile, StoreError
from cluster.tracking.tracker import Tracker
from cluster.train import run as run_module
from cluster.train.prepare import RunFolder, RunSpec, Start
from cluster.train.step_checkpoints import save_state
from configs.bounds import ConfigError
from configs.files import write_text
from configs.load import load_config
from tests.unit.store_cases import BUCKET, ENVIRONMENT, Machine, S3Server, contents, save, stored

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


# --- a run outlives its machine -----------------------------------------------------------------------------


def test_an_empty_machine_goes_on_with_the_run(server: S3Server, tmp_path: Path) -> None:
    first = Machine(server, tmp_path, "first")
    run = first.begin()
    mirror = first.mirror(run)
    for step in (2, 4, 6):  # the first is pruned here, and there
        save(run, step)
        mirror.saved()
    (run / "figures.jsonl").write_text('{"step": 6}\n')
    (run / "mlflow-1.sqlite").write_text("of this machine")
    (run / ".lock").write_text("of this machine")
    mirror.close(200)
    there, manifest = stored(first, run)
    assert {path.split("/")[1] for path in manifest.files if path.startswith("checkpoints/")} == {
        "step-000004",
        "step-000006",
    }
    assert there.blobs() == {content.sha256 for content in manifest.files.values()}  # nothing is left over

    second = Machine(server, tmp_path, "second")
    found = second.resumed()
    assert isinstance(found, Checkpoint) and found.state.step == 6
    assert contents(found.run_dir) == contents(run)
    assert not (found.run_dir / "mlflow-1.sqlite").exists()
    save(found.run_dir, 8)
    second.put(found.run_dir)

    # the first machine comes back, with its old disk: it must not go on from there
    again = first.resumed()
    assert isinstance(again, Checkpoint) and again.state.step == 8 and again.run_dir == run
    assert newest_whole(run.with_name(f"{run.name}.aside-1")).state.step == 6  # type: ignore[union-attr]
    # here is more than there: nothing is taken
    save(run, 9)
    again = first.resumed()
    assert isinstance(again, Checkpoint) and again.state.step == 9

    mark_finished(run, 10)
    first.put(run)
    with pytest.raises(AllFinished, match=r"nothing is left to do.*finished, the newest is trial-"):
        Machine(server, tmp_path, "third").resumed()


def test_a_run_without_a_checkpoint_goes_on_with_its_rows(server: S3Server, tmp_path: Path) -> None:
    first, second = (Machine(server, tmp_path, name) for name in ("first", "second"))
    run = first.begin()
    first.put(run)
    found = second.resumed()
    assert isinstance(found, Path) and (found / "evaluation" / "before.json").read_text() == "a row"
    newer = second.begin()
    assert (newer / "number").read_text() == "2\n"  # also where the other one's folder was never here
    assert (Machine(server, tmp_path, "third").begin() / "number").read_text() == "2\n"


class Learner:
    def save(self, folder: str) -> None:
        (Path(folder) / "model").mkdir(parents=True)
        (Path(folder) / "model" / "model.safetensors").write_text("weights")


def test_the_command_train_outlives_its_machines(
    server: S3Server, tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of ``train`` but Ray and engines: the first machine dies after a step, the second ends the run."""
    begun: list[Start] = []

    @asynccontextmanager
    async def no_cluster(*parts: object) -> AsyncIterator[None]:
        yield None

    async def train_on(
        cluster: None, spec: RunSpec, folder: RunFolder, start: Start, tracker: Tracker, display: Display
    ) -> None:
        begun.append(start)
        step = 10 if start.checkpoint is not None else 3
        await save_state(folder, spec.config, Learner(), replace(START, step=step, version=step))
        if step < 10:
            raise ClusterError("the machine is gone")

    monkeypatch.setattr(run_module, "training_cluster", no_cluster)
    monkeypatch.setattr(run_module, "train_on", train_on)

    def train(name: str) -> str:
        url = Machine(server, tmp_path, name).url
        words = [f"output_dir={url}", f"store.work_dir={tmp_path / name}", f"model.name={model_path}"]
        words += ["name=trial", "train.steps=10", "tracking.enabled=false", "resume=auto"]
        said = io.StringIO()
        with suppress(ClusterError):
            run_module.train_config(
                load_config(Path("tests/quickstart.yaml"), words), Display(Console(file=said, width=1000))
            )
        return said.getvalue()

    first = train("first")
    assert "to go on: engram train" in first and "stored:   s3://" in first
    shutil.rmtree(tmp_path / "first")
    second = train("second")
    assert "has more of the run than this machine" in second and "stored:   s3://" in second
    assert begun[1].state.step == 3 and begun[1].policy_path.is_relative_to(tmp_path / "second")
    shutil.rmtree(tmp_path / "second")
    assert "nothing is left to do" in train("third") and len(begun) == 2


def test_a_checkpoint_is_named_by_its_address(server: S3Server, tmp_path: Path) -> None:
    first, second = (Machine(server, tmp_path, name) for name in ("first", "second"))
    run = first.begin()
    for step in (2, 4):
        save(run, step)
    first.put(run)
    place = first.url.partition("?")[0]
    named = f"{place}/{run.name}/checkpoints/step-000002"
    folder = bring_named(replace(second.config, resume=named))
    assert load_whole(folder).state.step == 2 and folder.is_relative_to(tmp_path / "second")
    with pytest.raises(ConfigError, match="must be a checkpoint below output_dir"):
        bring_named(replace(second.config, resume="s3://other/run/checkpoints/step-000002"))


def test_commands_take_an_address(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    machine = Machine(server, tmp_path, "first")
    run = machine.begin()
    for step in (2, 4):
        save(run, step)
    machine.put(run)
    place, _, options = machine.url.partition("?")
    address = f"{place}/{run.name}?{options}"
    light = local_copy(address, weights=False)
    assert set(files_of(light)) == {"config.yaml", "number", "evaluation/before.json"}
    whole = local_copy(address, weights=True)
    assert contents(whole) == contents(run)
    one = local_copy(f"{place}/{run.name}/checkpoints/step-000002?{options}", weights=True)
    assert load_whole(one).state.step == 2 and not (one.parent / "step-000004").exists()
    written = (whole / "number").stat().st_ctime_ns
    assert (local_copy(address, weights=True) / "number").stat().st_ctime_ns == written  # not taken twice
    write_text(run / "evaluation" / "after_rl.json", "a row")
    machine.put(run)
    assert (local_copy(address, weights=False) / "evaluation" / "after_rl.json").exists()
    with pytest.raises(Exception, match="no run was stored there"):
        local_copy(f"{place}/nothing?{options}", weights=True)


def test_a_run_may_lie_in_the_bucket_itself(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    machine = Machine(server, tmp_path, "first")
    run = machine.begin()
    machine.url = f"s3://{BUCKET}?{machine.url.partition('?')[2]}"
    machine.put(run)
    address, _, options = machine.url.partition("?")
    assert contents(local_copy(f"{address}/{run.name}?{options}", weights=True)) == contents(run)
    inside = local_copy(f"{address}/{run.name}/evaluation/before.json?{options}", weights=False)
    assert inside.read_text() == "a row"


# --- nothing torn is believed -------------------------------------------------------------------------------


def test_a_copy_that_was_changed_is_not_believed(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(server, tmp_path, "first")
    run = machine.begin()
    for step in (2, 4):
        save(run, step)
    machine.put(run)
    there, manifest = stored(machine, run)
    disk, place = machine.stored.filesystem, f"{there.root}/blobs"
    optimizer = "checkpoints/step-000004/learner/optimizer.safetensors"
    blob = manifest.files[optimizer].sha256
    with disk.open_output_stream(f"{place}/{blob}") as file:
        file.write(b"torn")
    found = Machine(server, tmp_path, "second").resumed()
    assert isinstance(found, Checkpoint) and found.state.step == 2
    assert not (found.run_dir / "checkpoints" / "step-000004").exists()
    said = f"checkpoints/step-000004 is passed over: {optimizer} is not what was put there"
    assert caplog.text.count(said) == 1
    # a manifest that is cut off, with the highest number, is passed over
    with disk.open_output_stream(f"{there.root}/manifest-{manifest.number + 1:08d}.json") as file:
        file.write(b'{"number": 9, "files"')
    assert there.newest() == manifest
    disk.delete_file(f"{place}/{manifest.files['config.yaml'].sha256}")
    with pytest.raises(DamagedError, match=r"config\.yaml is missing there"):
        Machine(server, tmp_path, "third").resumed()


def test_a_file_that_is_deleted_while_it_is_read(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 has no word for it that pyarrow knows: it is missing, and no store that refuses."""
    machine = Machine(server, tmp_path, "first")
    run = machine.begin()
    machine.put(run)
    there, manifest = stored(machine, run)
    real = store._copied

    def copied(read: Callable[[int], bytes], write: Callable[[bytes], object], size: int) -> StoredFile:
        def deleted(number: int) -> bytes:
            chunk = read(5)
            there.delete({content.sha256 for content in manifest.files.values()})
            return chunk

        return real(deleted, write, size)

    monkeypatch.setattr(store, "_copied", copied)
    with pytest.raises(DamagedError, match="is missing there"):
        there.take(manifest, tmp_path / "taken")


def test_a_manifest_cannot_lead_out_of_the_folder(server: S3Server, tmp_path: Path) -> None:
    machine = Machine(server, tmp_path, "first")
    there = machine.stored.run("trial-20260101-000000")
    for path in ("../../stolen", "/etc/stolen", "a/../../b"):
        text = {"number": 1, "writer": "x", "files": {path: {"sha256": "0" * 64, "size": 0}}}
        with machine.stored.filesystem.open_output_stream(f"{there.root}/manifest-00000001.json") as file:
            file.write(json.dumps({**text, "format": "engram-store-1"}).encode())
        assert there.newest() is None


def test_a_damaged_checkpoint_is_not_put_there(server: S3Server, tmp_path: Path) -> None:
    machine = Machine(server, tmp_path, "first")
    run = machine.begin()
    save(run, 2)
    weights = save(run, 4) / "learner" / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    machine.put(run)
    assert len([line for line in machine.said if "step-000004 is not put into" in line]) == 1
    _, manifest = stored(machine, run)
    assert not [path for path in manifest.files if "step-000004" in path]
    assert [path for path in manifest.files if "step-000002" in path]


# --- a store that is away -----------------------------------------------------------------------------------


def test_a_store_that_is_away_costs_two_lines(server: S3Server, tmp_path: Path) -> None:
    machine = Machine(server, tmp_path, "first")
    run = machine.begin()
    server.away()
    try:  # at the start
        mirror = machine.mirror(run)
        _until(lambda: machine.said)
        assert "the run goes on; 3 files" in machine.said[0] and "does not answer" in machine.said[0]
        save(run, 2)  # the outbox grows, without another word
        mirror.saved()
        server.back()
        _until(lambda: len(machine.said) > 1)
        assert "answers again" in machine.said[1]
        server.away()  # in the middle
        save(run, 4)
        mirror.saved()
        _until(lambda: len(machine.said) > 2)
        server.back()
        _until(lambda: len(machine.said) > 3)
        server.away()  # at the end
        save(run, 6)
        mirror.saved()
        mirror.close(200, stopped=True)  # a run that is told to stop does not wait for it
    finally:
        server.back()
    lost = [line for line in machine.said if "the run goes on" in line]
    assert len(lost) == 2 and len([line for line in machine.said if "answers again" in line]) == 2
    assert len(machine.said) in (5, 6)  # the end says what is left, and before that why
    assert "and are not in s3://" in machine.said[-1] and "wait in" in machine.said[-1]
    _, manifest = stored(machine, run)
    assert max(path for path in manifest.files if "state.json" in path).split("/")[1] == "step-000004"
    with mirrored(machine.config, run, machine.said.append):  # the next process
        pass
    assert machine.said[-1].startswith("stored:")
    assert isinstance(found := Machine(server, tmp_path, "second").resumed(), Checkpoint)
    assert found.state.step == 6


def test_resume_without_an_answer(server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(server, tmp_path, "first")
    server.away()
    try:
        with pytest.raises(StoreError, match=r"no unfinished run of trial.*start anew with resume="):
            machine.resumed()
        run = machine.begin()
        save(run, 2)
        assert isinstance(found := machine.resumed(), Checkpoint) and found.state.step == 2
        assert "the run goes on from" in caplog.text
        with pytest.raises(StoreError, match="does not answer"):
            machine.stored.require_writable()
    finally:
        server.back()
    machine.stored.require_writable()
    other = machine.url.replace(f"{BUCKET}/", "no-such-bucket/")
    with pytest.raises(ConfigError, match=r"NO_SUCH_BUCKET.*give another output_dir"):
        Store(other, 20.0).require_writable()


def test_googles_store_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nobody there either
    begun = time.monotonic()
    with pytest.raises(StoreError, match="does not answer"):
        Store("gs://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9", 1.0).runs()
    assert time.monotonic() - begun < 60  # Google's client tries for 15 minutes


def test_two_machines_with_one_run(server: S3Server, tmp_path: Path) -> None:
    """The one that was taken for dead sees the other, and puts nothing more there."""
    first, second = (Machine(server, tmp_path, name) for name in ("first", "second"))
    run = first.begin()
    save(run, 2)
    alive = first.mirror(run)
    _until(lambda: alive._complete)
    found = second.resumed()
    assert isinstance(found, Checkpoint)
    save(found.run_dir, 4, "of the second")
    second.put(found.run_dir)
    save(run, 6, "of the first")
    alive.saved()
    alive.close(200)
    assert "another machine goes on with this run" in first.said[-1]
    _, manifest = stored(first, run)
    assert {path.split("/")[1] for path in manifest.files if "state.json" in path} == {
        "step-000002",
        "step-000004",
    }


def test_going_on_from_an_old_copy_keeps_what_others_did(server: S3Server, tmp_path: Path) -> None:
    first, second = (Machine(server, tmp_path, name) for name in ("first", "second"))
    run = first.begin()
    save(run, 2)
    first.put(run)
    found = second.resumed()
    assert isinstance(found, Checkpoint)
    save(found.run_dir, 8)
    second.put(found.run_dir)
    first.put(run)  # resume=<its step 2>: the user's choice; it is not the end of the only copy of step 8
    _, manifest = stored(first, run)
    assert "checkpoints/step-000008/state.json" in manifest.files


def _until(holds: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
