"""The stages of a run: which rows are measured, when, on which workers; how a step is saved and scored."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from actors.types import Task, TrajectoryGroup
from cluster.common.display import Display
from cluster.common.errors import ClusterError, WeightsLost, WorkerLost
from cluster.measure.rows import EvaluationRow
from cluster.runs.checkpoint import START, TrainState, list_checkpoints, load_checkpoint, score_of
from cluster.train import run
from cluster.train.prepare import RunFolder, RunSpec, Start
from cluster.train.scoreboard import Observers, evaluation_rows
from cluster.train.step_checkpoints import StepCheckpoints, save_state
from configs.schema import RunConfig, TrainConfig, WarmStartConfig
from learner.types import LearnerLost, WarmStartReport
from tests.unit.cluster_cases import group, task_at
from tests.unit.loop_cases import Recorder


async def no_warm_start(*parts: object) -> TrainState:
    return START


def measured(
    monkeypatch: pytest.MonkeyPatch,
    rl_steps: int,
    warm_start: Callable[..., Any] = no_warm_start,
    reinforce: Callable[..., Any] | None = None,
    recovery: Any = None,
) -> list[tuple[str, int, str]]:
    rows: list[tuple[str, int, str]] = []

    class Board:
        def __init__(self, *parts: object) -> None: ...

        async def measure(self, key: str, step: int, workers: str) -> None:
            rows.append((key, step, workers))

        def forget(self, *keys: str) -> None: ...

        def ahead(self, keys: Sequence[str]) -> int:
            return 4 * len(keys)

        def report(self, rewards: tuple[float, ...]) -> None: ...

    async def reinforced(*parts: object) -> tuple[TrainState, str]:
        return replace(START, step=rl_steps), "those left"

    monkeypatch.setattr(run, "Scoreboard", Board)
    monkeypatch.setattr(run, "_warm_start", warm_start)
    monkeypatch.setattr(run, "_reinforce", reinforce or reinforced)
    cluster: Any = SimpleNamespace(crew=SimpleNamespace(seats="the first"), recovery=recovery)
    observers: Any = SimpleNamespace(tracker=SimpleNamespace(run_id="run"), display=Display())
    nothing: Any = None
    spec: Any = SimpleNamespace(config=RunConfig(warm_start=WarmStartConfig(steps=0)))
    asyncio.run(run._stages(cluster, spec, nothing, Start(None, START, Path()), observers))
    return rows


def test_the_trained_policy_is_measured_last_on_the_workers_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = [("memory_off", 0, "the first"), ("before", 0, "the first")]
    last = [(key, 5, "those left") for key in ("after_rl", "oracle", "other_cards")]
    assert measured(monkeypatch, 5) == [*first, *last]


def test_without_an_rl_step_no_row_says_after_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [key for key, _, _ in measured(monkeypatch, 0)] == [
        "memory_off",
        "before",
        "oracle",
        "other_cards",
    ]


def test_a_learner_lost_while_a_row_was_measured_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed when its weights are asked for, before RL."""
    lost: list[Exception] = [LearnerLost("learner weights: a rank's process died"), WeightsLost(3)]
    restarted: list[str] = []

    async def serve(cluster: Any) -> None:
        if lost:
            raise lost.pop(0)

    def restart(error: LearnerLost, state: TrainState) -> tuple[TrainState, int]:
        restarted.append(str(error))
        return replace(state, version=9), 1

    async def warm_start(*parts: object) -> TrainState:
        return replace(START, warm_steps=2)

    begun: list[TrainState] = []

    async def reinforce(*parts: Any) -> tuple[TrainState, str]:
        begun.append(parts[3])
        return parts[3], ""

    monkeypatch.setattr(run, "_serve_newest", serve)
    measured(monkeypatch, 0, warm_start, reinforce, SimpleNamespace(restart=restart))
    assert restarted == ["learner weights: a rank's process died", str(WeightsLost(3))]
    assert [state.version for state in begun] == [9] and begun[0].warm_steps == 2


# --- the control that goes on with supervised steps --------------------------------------------------------


class Supervised:
    """Counts supervised steps as the learner does."""

    def __init__(self, version: int) -> None:
        self.version, self.taught = version, list[str]()

    def warm_start_step(self, segments: list[Any], learning_rate: float) -> WarmStartReport:
        self.version += 1
        self.taught.append(str(segments))
        return WarmStartReport(self.version, 0.5, 1.0, 3, 0.1)

    def save(self, folder: str) -> None:
        Path(folder).mkdir()


def test_the_supervised_control_makes_as_many_steps_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_config = TrainConfig(steps=4, control="supervised", group_size=2)
    config = RunConfig(train=train_config, warm_start=WarmStartConfig(steps=3))
    served: list[int] = []

    async def serve(cluster: Any) -> None:
        served.append(cluster.learner.version)

    def demonstrations(spec: RunSpec, purpose: str) -> Any:
        return SimpleNamespace(
            of_step=lambda step: f"{purpose} {step}", figures=dict, note=lambda: "3 dropped"
        )

    monkeypatch.setattr(run, "_serve_newest", serve)
    monkeypatch.setattr(run, "build_demonstrations", demonstrations)
    learner, (observers, tracker, said) = Supervised(version=3), observers_of(Seat())
    cluster: Any = SimpleNamespace(crew=SimpleNamespace(seats=("w",)), learner=learner)
    begun = replace(START, warm_steps=3, version=3)
    for wanted in (2, 4):
        spec = spec_of(replace(config, train=replace(train_config, steps=wanted)))
        begun, workers = asyncio.run(run._reinforce(cluster, spec, RunFolder(tmp_path), begun, observers))
        assert (begun.step, begun.version, workers) == (wanted, 3 + wanted, ("w",))
        assert load_checkpoint(list_checkpoints(tmp_path)[-1]).state == begun
    assert learner.taught == [f"supervised control {step}" for step in range(4)]
    assert served == [5, 7] and sorted(tracker.steps) == [4, 5, 6, 7]
    assert said.getvalue().count("supervised steps: 3 dropped\n") == 2  # a bar would be gone by now


@pytest.mark.parametrize(
    ("control", "label"),
    [
        ("shuffled_rewards", "TMEM after RL, rewards shuffled"),
        ("supervised", "TMEM after more supervised steps"),
    ],
)
def test_a_control_is_named_in_its_row(control: Any, label: str) -> None:
    assert evaluation_rows(RunConfig(train=TrainConfig(control=control)))["after_rl"].label == label


# --- a step that is saved and scored ---------------------------------------------------------------------


class Seat:
    """Stands for learner, stream, fleet, worker and recorder; keeps the order of the calls."""

    name = "worker-0"

    def __init__(self, score: float | ClusterError = 0.5) -> None:
        self.calls: list[str] = []
        self._score = score
        self._up = True
        self.state = SimpleNamespace(progress=lambda: None)

    @property
    def workers(self) -> tuple[Seat, ...]:
        return (self,) if self._up else ()

    def lost(self, name: str, error: ClusterError) -> None:
        self._up = False

    def save(self, folder: str) -> None:
        self.calls.append("save")
        Path(folder).mkdir()

    def hold(self) -> None:
        self.calls.append("hold")

    def release(self) -> None:
        self.calls.append("release")

    async def settled(self) -> None:
        self.calls.append("settled")

    async def finish(self) -> None:
        self.calls.append("finish")

    async def load_again(self) -> None:
        self.calls.append("load again")

    def watch(self, sources: Sequence[Seat], config: RunConfig, step: int) -> Sequence[Seat]:
        return sources

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        self.calls.append(f"{task.id}: {row.label}")
        if isinstance(self._score, ClusterError):
            raise self._score
        return group(task, 2, rewards=[self._score])


TRAIN = TrainConfig(evaluate_every=2, evaluate_tasks=2, checkpoint_every=1, keep_checkpoints=3)


def spec_of(config: RunConfig) -> RunSpec:
    environment: Any = None
    return RunSpec(config, environment, Path(), tuple(task_at(number) for number in range(3)))


def observers_of(seat: Any) -> tuple[Observers, Recorder, io.StringIO]:
    tracker, output = Recorder(), io.StringIO()
    return Observers(tracker, Display(Console(file=output, width=160)), seat), tracker, output


def checkpoints(folder: Path, seat: Any) -> tuple[StepCheckpoints, Recorder, io.StringIO]:
    observers, tracker, output = observers_of(seat)
    spec = spec_of(RunConfig(train=TRAIN))
    return StepCheckpoints(spec, RunFolder(folder), seat, seat, seat, observers), tracker, output


def run_to(built: StepCheckpoints, *steps: int) -> None:
    async def body() -> None:
        for step in steps:
            built.on_step(step)
            await built.on_checkpoint(replace(START, step=step, version=step))

    asyncio.run(body())


def test_an_evaluated_step_is_a_barrier_and_leaves_workers_as_a_new_start_would(tmp_path: Path) -> None:
    seat = Seat()
    built, tracker, output = checkpoints(tmp_path, seat)
    run_to(built, 1, 2)
    label = "TMEM after RL at step 2"
    evaluation = ["settled", "finish", f"t0: {label}", f"t1: {label}", "load again", "release"]
    assert seat.calls == ["save", "hold", "save", *evaluation]
    assert [score_of(folder) for folder in list_checkpoints(tmp_path)] == [None, ("f1", 0.5)]
    assert list(tracker.steps) == [2] and tracker.steps[2]["eval/held_out/f1"] == 0.5
    assert "step 2: held-out F1 50.0 % of 2 tasks (the best so far: kept)" in output.getvalue()


def test_a_run_that_is_told_to_stop_saves_the_step_and_evaluates_nothing(tmp_path: Path) -> None:
    """The evaluation may last an hour, and whoever asked for the end kills the run before."""
    seat = Seat()
    built, _, _ = checkpoints(tmp_path, seat)

    async def body() -> None:
        built.on_step(2)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)  # as the loop does, which then saves
        await built.on_checkpoint(replace(START, step=2, version=2))

    asyncio.run(body())
    assert seat.calls == ["hold", "save"]


def test_a_step_is_saved_and_evaluated_once(tmp_path: Path) -> None:
    seat = Seat()
    built, _, _ = checkpoints(tmp_path, seat)
    run_to(built, 2)
    calls = list(seat.calls)
    asyncio.run(built.on_checkpoint(replace(START, step=2)))
    assert seat.calls == calls


def test_a_fleet_with_nobody_left_costs_the_step_its_score_and_not_yet_the_run(
    tmp_path: Path,
) -> None:
    seat = Seat(WorkerLost("worker-0 died during task t0"))
    built, _, output = checkpoints(tmp_path, seat)
    run_to(built, 2)
    assert seat.calls[-2:] == ["load again", "release"]
    (folder,) = list_checkpoints(tmp_path)
    assert score_of(folder) is None
    assert "step 2 has no held-out score: worker-0 died during task t0" in output.getvalue()


def test_a_cancelled_run_ends_the_checkpoint_that_it_writes(tmp_path: Path) -> None:
    writing, go_on = threading.Event(), threading.Event()

    class Slow:
        def save(self, folder: str) -> None:
            writing.set()
            go_on.wait(10)
            Path(folder).mkdir()

    async def body() -> None:
        state = replace(START, step=2)
        saving = asyncio.create_task(save_state(RunFolder(tmp_path), RunConfig(train=TRAIN), Slow(), state))
        await asyncio.to_thread(writing.wait, 10)
        saving.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await saving

    asyncio.run(body())
    (folder,) = list_checkpoints(tmp_path)
    assert load_checkpoint(folder).state.step == 2
