"""A run's copy in a store while others work: pruning in mid-upload, other machines, a silent store."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.common.folders import output_folder
from cluster.runs import mirror as mirror_module
from cluster.runs.checkpoint import Checkpoint, newest_whole
from cluster.runs.from_store import bring_newest, local_copy, newest_number
from cluster.runs.mirror import Mirror, mirrored
from cluster.runs.run_files import files_of
from cluster.runs.store import Manifest, StoredFile, StoredRun, checkpoint_of
from configs.files import remove_folder, write_text
from tests.unit.store_cases import ENVIRONMENT, Disk, Machine, Silent, contents, save, stored

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(Disk(tmp_path / "disk"), tmp_path, "first")


# --- what is pruned or damaged here -------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["listed", "first file", "all files"])
def test_a_checkpoint_that_is_pruned_on_its_way_costs_no_other(
    moment: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment the store holds a whole checkpoint: what replaces it comes first."""
    run = machine.begin()
    save(run, 2)
    machine.put(run)
    save(run, 4, keep=1)
    begun = threading.Event()
    written: list[dict[str, set[str]]] = []
    real_list, real_put, real_write = mirror_module.files_of, StoredRun.put, StoredRun.write

    def replaced(now: str) -> None:
        if now == moment and not begun.is_set():
            begun.set()
            save(run, 6, keep=1)

    def listed(folder: Path, below: str = "") -> dict[str, tuple[int, int, int]]:
        found = real_list(folder, below)
        if not below and real_list(folder, "checkpoints/step-000004"):
            replaced("listed")
        return found

    def put(self: StoredRun, path: Path, *rest: object) -> None:
        if "step-000004" in str(path):
            replaced("first file")
        real_put(self, path, *rest)  # type: ignore[arg-type]
        if path.name == "state.json":
            replaced("all files")

    def write(self: StoredRun, manifest: Manifest) -> None:
        units: dict[str, set[str]] = {}
        for path in manifest.files:
            units.setdefault(checkpoint_of(path), set()).add(path.rpartition("step-")[2].partition("/")[2])
        written.append(units)
        real_write(self, manifest)

    monkeypatch.setattr(mirror_module, "files_of", listed)
    monkeypatch.setattr(StoredRun, "put", put)
    monkeypatch.setattr(StoredRun, "write", write)
    machine.put(run)
    assert begun.is_set() and len(machine.said) == 2  # stored, and stored
    whole = set(read(run, "step-000006"))
    for units in written:
        units.pop("")
        assert units and all(names == whole for names in units.values())
    there, manifest = stored(machine, run)
    assert {checkpoint_of(path) for path in manifest.files} == {"", "checkpoints/step-000006"}
    assert there.blobs() == {content.sha256 for content in manifest.files.values()}


def read(run: Path, name: str) -> list[str]:
    return [path.partition(f"{name}/")[2] for path in files_of(run, f"checkpoints/{name}")]


def test_a_checkpoint_that_is_damaged_here_stays_there(machine: Machine) -> None:
    run = machine.begin()
    for step in (2, 4):
        save(run, step)
    machine.put(run)
    good = stored(machine, run)[1].files
    for step in (2, 4):  # the disk fails, below both
        (run / f"checkpoints/step-00000{step}/learner/model/model.safetensors").write_text("torn")
    save(run, 6, keep=3)
    machine.put(run)
    there, manifest = stored(machine, run)
    assert good.items() <= manifest.files.items()
    there.take(manifest, run.with_name("taken"))
    remove_folder(run.with_name("taken") / "checkpoints" / "step-000006")
    assert (found := newest_whole(run.with_name("taken"))) is not None and found.state.step == 4
    # of the newest a file is gone: it does not replace the others
    save(run, 8, keep=1)
    (run / "checkpoints/step-000008/learner/optimizer.safetensors").unlink()
    machine.put(run)
    assert "step-000008 is not put into" in machine.said[-2]
    assert "incomplete: checkpoints/step-000008/learner/optimizer" in machine.said[-2]
    assert stored(machine, run)[1].files == manifest.files


def test_a_folder_that_is_away_deletes_nothing(machine: Machine) -> None:
    """The disk of the run is not mounted any longer, or somebody deleted the folder."""
    run = machine.begin()
    save(run, 2)
    mirror = machine.mirror(run)
    until(lambda: mirror._complete)
    before = stored(machine, run)[1]
    run.rename(run.with_name("away"))
    mirror.saved()
    until(lambda: machine.said)
    assert "has no files any longer: the run goes on" in machine.said[0]
    run.with_name("away").rename(run)
    mirror.close(60)
    assert stored(machine, run)[1].files == before.files


def test_a_checkpoint_on_another_disk_is_left_out(machine: Machine) -> None:
    """A link is not followed. It costs no other checkpoint, and no endless look."""
    run = machine.begin()
    save(run, 2)
    machine.put(run)
    moved = save(run, 4).rename(run.with_name("another disk"))
    (run / "checkpoints" / "step-000004").symlink_to(moved, target_is_directory=True)
    machine.put(run)
    assert {checkpoint_of(path) for path in stored(machine, run)[1].files} == {"", "checkpoints/step-000002"}


def test_files_that_vanish_under_the_look(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = machine.begin()
    real = os.scandir

    def refuse(folder: str) -> Iterator[os.DirEntry[str]]:
        if "evaluation" in str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)  # type: ignore[return-value]

    def vanish(folder: str) -> Iterator[os.DirEntry[str]]:
        if "evaluation" in str(folder):
            shutil.rmtree(folder, ignore_errors=True)
        return real(folder)  # type: ignore[return-value]

    with monkeypatch.context() as patched:  # a folder that cannot be read is not an empty one
        patched.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError):
            files_of(run)
    monkeypatch.setattr(os, "scandir", vanish)
    assert set(files_of(run)) == {"config.yaml", "number"}


# --- two machines -------------------------------------------------------------------------------------------


def test_a_stale_machine_keeps_what_another_one_measured(tmp_path: Path) -> None:
    first, second = (Machine(Disk(tmp_path / "disk"), tmp_path, name) for name in ("first", "second"))
    run = first.begin("trial-evaluate")
    write_text(run / "cells" / "a.json", "of the first") if (run / "cells").mkdir() is None else None
    write_text(run / "cells" / "c.jsonl", "settings\ntask 1\n")
    first.put(run)
    bring_newest(second.config, "trial-evaluate")
    other = output_folder(second.config) / run.name
    assert contents(other) == contents(run)
    write_text(other / "cells" / "b.json", "of the second")
    write_text(other / "cells" / "c.jsonl", "settings\ntask 1\ntask 2\n")
    second.put(other)
    write_text(run / "cells" / "d.json", "of the first, not stored")

    first.put(run)  # where the store did not answer before
    names = {path for path in stored(first, run)[1].files if path.startswith("cells/")}
    assert names == {"cells/a.json", "cells/b.json", "cells/c.jsonl", "cells/d.json"}
    second.put(other)
    bring_newest(first.config, "trial-evaluate")
    assert (run / "cells" / "b.json").read_text() == "of the second"
    assert (run / "cells" / "c.jsonl").read_text() == "settings\ntask 1\ntask 2\n"
    assert (run / "cells" / "d.json").exists()
    assert not list(run.parent.glob("*.aside-*")) and not list(run.parent.glob("*.new"))
    # what was deleted here after that is deleted there
    mirror = first.mirror(run)
    until(lambda: mirror._complete)
    (run / "cells" / "b.json").unlink()
    mirror.close(60)
    assert "cells/b.json" not in stored(first, run)[1].files


def test_a_training_takes_the_rows_of_another_machine(tmp_path: Path) -> None:
    first, second = (Machine(Disk(tmp_path / "disk"), tmp_path, name) for name in ("first", "second"))
    run = first.begin()
    save(run, 2)
    first.put(run)
    found = second.resumed()
    assert isinstance(found, Checkpoint)
    write_text(found.run_dir / "evaluation" / "after_rl.json", "a row of the second")
    second.put(found.run_dir)
    again = first.resumed()
    assert isinstance(again, Checkpoint) and again.run_dir == run and again.state.step == 2
    assert (run / "evaluation" / "after_rl.json").read_text() == "a row of the second"


# --- readers of a run that goes on --------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["listed", "number", "state.json", "before.json", "model.safetensors"])
def test_a_reader_of_a_live_run(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on while it is taken, and deletes what is taken: the newest is taken instead."""
    first, second = (Machine(Disk(tmp_path / "disk"), tmp_path, name) for name in ("first", "second"))
    run = first.begin()
    save(run, 2)
    first.put(run)
    moments = [moment]
    real_take, real_numbers = StoredRun._take, StoredRun.numbers

    def goes_on(now: str) -> None:
        if [now] == moments:
            moments.clear()
            write_text(run / "evaluation" / "before.json", "another row")
            write_text(run / "number", "1 \\n")
            save(run, 4, keep=1)
            first.put(run)

    def numbers(self: StoredRun) -> list[int]:
        found = real_numbers(self)
        goes_on("listed")
        return found

    def take(self: StoredRun, content: StoredFile, path: Path) -> None:
        goes_on(path.name)
        real_take(self, content, path)

    monkeypatch.setattr(StoredRun, "numbers", numbers)
    monkeypatch.setattr(StoredRun, "_take", take)
    found = second.resumed()
    assert not moments and isinstance(found, Checkpoint) and found.state.step == 4
    assert contents(found.run_dir) == contents(run)
    assert "passed over" not in caplog.text and "missing" not in caplog.text


def test_what_is_in_the_cache_is_not_taken_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    machine = Machine(Disk(tmp_path / "disk"), tmp_path, "first")
    run = machine.begin()
    save(run, 2)
    machine.put(run)
    address = f"{machine.url}/{run.name}"
    light = local_copy(address, weights=False)
    written = (light / "number").stat().st_ctime_ns
    save(run, 4)
    machine.put(run)
    again = local_copy(address, weights=False)  # no weights are wanted
    assert (again / "number").stat().st_ctime_ns == written
    _, manifest = stored(machine, run)
    state = manifest.files["checkpoints/step-000004/state.json"].sha256
    (tmp_path / "disk" / tmp_path.name / run.name / "blobs" / state).write_text("torn")
    for times in (1, 2):  # it is said each time
        copy = local_copy(address, weights=True)
        assert (found := newest_whole(copy)) is not None and found.state.step == 2
        assert not (copy / "checkpoints" / "step-000004").exists()
        assert caplog.text.count("step-000004 is passed over") == times


def test_the_number_of_a_new_run_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(Disk(tmp_path / "disk"), tmp_path, "first")
    for step in (2, 4):
        run = machine.begin()
        save(run, step)
        machine.put(run)
    taken: list[str] = []
    real = StoredRun._take

    def take(self: StoredRun, content: StoredFile, path: Path) -> None:
        taken.append(path.name)
        real(self, content, path)

    monkeypatch.setattr(StoredRun, "_take", take)
    assert newest_number(machine.config, "trial") == 2
    assert taken == ["number", "number"]


# --- the thread and its end ---------------------------------------------------------------------------------


def test_nothing_ends_the_copying_unheard(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours, and a terminal that is gone: the next round goes on."""
    run = machine.begin()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        raise BrokenPipeError(32, "Broken pipe")

    faults = [KeyError("a fault")]

    def listed(folder: Path) -> list[Path]:
        if faults:
            raise faults.pop()
        return []

    monkeypatch.setattr(mirror_module, "list_checkpoints", listed)
    with mirrored(machine.config, run, say) as saved:
        until(lambda: said)
        saved()
    assert "KeyError: 'a fault': the run goes on" in said[0]
    assert "answers again" in said[1] and said[2].startswith("stored:")
    assert set(stored(machine, run)[1].files) == set(files_of(run))


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Machine, Path, Mirror]]:
    """A run whose store takes connections and does not answer."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server = Silent()
    machine = Machine(server, tmp_path, "first")
    other = Machine(Disk(tmp_path / "disk"), tmp_path, "first")
    run = other.begin()
    mirror = machine.mirror(run)
    yield machine, run, mirror
    server.close()
    mirror._thread.join(60)
    assert not mirror._thread.is_alive()


def test_a_run_that_is_stopped_waits_5_s_for_a_silent_store(silent: tuple[Machine, Path, Mirror]) -> None:
    machine, run, mirror = silent
    begun = time.monotonic()
    mirror.close(200, stopped=True)
    assert 4 < time.monotonic() - begun < 9
    assert machine.said == [
        f"warning: 3 files, 0.0 MiB, wait in {run} and are not in {mirror._run.url} (no answer within 5 s); "
        "the same command with resume=auto on this machine puts them there"
    ]


def test_an_interrupted_wait_ends_the_copying(
    silent: tuple[Machine, Path, Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, _, mirror = silent

    def interrupted(*rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mirror._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mirror.close(200)
    assert "(it took more than 0 s)" in machine.said[-1]  # and the fixture sees the thread end


def test_a_run_that_is_stopped_waits_for_a_slow_store(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_STOPPED_WAIT_S", 0.4)
    monkeypatch.setattr(mirror_module, "_SAY_AFTER_S", 0.2)
    real = StoredRun.put

    def slow(self: StoredRun, path: Path, content: StoredFile, goes_on: Callable[[], bool]) -> None:
        time.sleep(1.5)
        real(self, path, content, goes_on)

    monkeypatch.setattr(StoredRun, "put", slow)
    run = machine.begin()
    machine.mirror(run).close(60, stopped=True)
    assert "they are put into" in machine.said[0] and machine.said[1].startswith("stored:")
    assert len(machine.said) == 2


def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
