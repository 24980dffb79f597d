"""A finished run that a user goes back into by a checkpoint's name is at work again, also in its store."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.common.display import Display
from cluster.common.errors import ClusterError
from cluster.runs.checkpoint import START
from cluster.runs.run_folders import finished_steps, mark_finished, returns
from cluster.tracking.tracker import Tracker
from cluster.train import run as run_module
from cluster.train.prepare import RunFolder, RunSpec, Start
from cluster.train.step_checkpoints import save_state
from configs.load import load_config

STEPS = 10


class Learner:
    def save(self, folder: str) -> None:
        (Path(folder) / "model").mkdir(parents=True)
        (Path(folder) / "model" / "model.safetensors").write_text("weights")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All of ``train`` but Ray and engines. It lists the step from which each life begins.

    A life saves step 4 and the last one. One that begins at step 4 dies behind step 6.
    """
    steps: list[int] = []

    @asynccontextmanager
    async def no_cluster(*parts: object) -> AsyncIterator[None]:
        yield None

    async def train_on(
        cluster: None, spec: RunSpec, folder: RunFolder, start: Start, tracker: Tracker, display: Display
    ) -> None:
        steps.append(start.state.step)
        ahead = {0: (4, STEPS), 4: (6,)}.get(start.state.step, (STEPS,))
        for step in ahead:
            await save_state(folder, spec.config, Learner(), replace(START, step=step, version=step))
        if start.state.step == 4:
            raise ClusterError("the machine is gone")

    monkeypatch.setattr(run_module, "training_cluster", no_cluster)
    monkeypatch.setattr(run_module, "train_on", train_on)
    return steps


def training(output_dir: str, model_path: Path, resume: str, *settings: str) -> str:
    """Train, and return what the user was told."""
    words = [f"output_dir={output_dir}", f"resume={resume}", f"model.name={model_path}", *settings]
    words += ["name=trial", f"train.steps={STEPS}", "train.keep_checkpoints=3", "tracking.enabled=false"]
    said = io.StringIO()
    with suppress(ClusterError):
        run_module.train_config(
            load_config(Path("tests/quickstart.yaml"), words), Display(Console(file=said, width=1000))
        )
    return said.getvalue()


def only_run(folder: Path) -> Path:
    (run,) = (path for path in folder.rglob("trial-*") if path.is_dir() and "aside" not in path.name)
    return run


def test_after_a_kill_it_goes_on_where_it_was_killed(
    tmp_path: Path, model_path: Path, begun: list[int]
) -> None:
    training(str(tmp_path), model_path, "auto")
    run = only_run(tmp_path)
    assert "nothing is left to do" in training(str(tmp_path), model_path, "auto")
    training(str(tmp_path), model_path, str(run / "checkpoints" / "step-000004"))
    assert finished_steps(run) == -1
    training(str(tmp_path), model_path, "auto")
    assert begun == [0, 4, 6] and finished_steps(run) == STEPS and only_run(tmp_path) == run
    assert "nothing is left to do" in training(str(tmp_path), model_path, "auto")


def test_the_mark_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "finished").write_text("10\n")
    assert (finished_steps(tmp_path), returns(tmp_path)) == (10, 0)
    mark_finished(tmp_path, 12)
    assert (finished_steps(tmp_path), returns(tmp_path)) == (12, 0)
    (tmp_path / "finished").write_text("")  # of a torn copy
    assert (finished_steps(tmp_path), returns(tmp_path)) == (-1, 0)


# --- with a store -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machines:
    """Machines that share a store, each with a disk of its own."""

    folder: Path
    model_path: Path

    def run(self, machine: str) -> Path:
        return only_run(self.folder / machine)

    def train(self, machine: str, resume: str = "auto") -> str:
        work = f"store.work_dir={self.folder / machine}"
        return training(f"file://{self.folder}/store", self.model_path, resume, work)

    def go_back(self, machine: str) -> str:
        return self.train(machine, str(self.run(machine) / "checkpoints" / "step-000004"))


@pytest.fixture
def machines(tmp_path: Path, model_path: Path, begun: list[int]) -> Machines:
    (tmp_path / "store").mkdir()
    machines = Machines(tmp_path, model_path)
    machines.train("first")
    assert "nothing is left to do" in machines.train("second")
    return machines


def test_another_machine_goes_on_with_it(machines: Machines, begun: list[int]) -> None:
    machines.go_back("first")
    assert "has more of the run than this machine" in machines.train("second")
    assert begun == [0, 4, 6] and finished_steps(machines.run("second")) == STEPS
    # The first one's copy is the older one now.
    assert "nothing is left to do" in machines.train("first")
    assert begun == [0, 4, 6] and finished_steps(machines.run("first")) == STEPS


def test_what_the_store_does_not_know_yet_is_not_set_aside(
    machines: Machines, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is killed before its store has heard that the run is at work again."""
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "mirrored", lambda config, run_dir, say: nullcontext(lambda: None))
        machines.go_back("first")
    assert "nothing is left to do" in machines.train("third")  # as far as the store knows
    said = machines.train("first")
    assert begun == [0, 4, 6] and "has more of the run" not in said
    assert "nothing is left to do" in machines.train("fourth")
    assert not list(machines.folder.rglob("*aside*"))
