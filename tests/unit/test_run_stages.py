"""The stages of a run: which rows are measured, when, on which workers; how a step is saved and scored."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from actors.types import Task, TrajectoryGroup
from cluster.common.display import Display
from cluster.common.errors import AllFinished, ClusterError, UnloadableError, WeightsLost, WorkerLost
from cluster.measure.rows import EvaluationRow, load_row
from cluster.runs.checkpoint import START, TrainState, list_checkpoints, load_checkpoint, score_of
from cluster.train import run
from cluster.train.prepare import RunFolder, RunSpec, Start
from cluster.train.scoreboard import Observers, Scoreboard, evaluation_rows
from cluster.train.step_checkpoints import StepCheckpoints, save_state
from configs.schema import EvaluationConfig, MemoryConfig, RunConfig, TrainConfig, WarmStartConfig
from learner.types import LearnerLost, WarmStartReport
from tests.unit.cluster_cases import group, task_at
from tests.unit.loop_cases import Recorder
from tests.unit.test_killed_saves import checkpoint


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


# --- the rows of the table ----------------------------------------------------------------------------------


def test_a_row_is_measured_once_and_again_after_it_was_forgotten(tmp_path: Path) -> None:
    seat = Seat()
    observers, tracker, _ = observers_of(seat)
    scores = Scoreboard(spec_of(RunConfig()), RunFolder(tmp_path), observers)
    for _ in range(2):
        asyncio.run(scores.measure("before", 0, [seat]))
    assert seat.calls == [f"t{number}: TMEM before" for number in range(3)]
    assert load_row(tmp_path / "evaluation" / "before.json").label == "TMEM before"
    assert tracker.steps[0]["eval/before/f1"] == 0.5
    scores.forget("before")
    asyncio.run(scores.measure("before", 0, [seat]))
    assert len(seat.calls) == 6


def test_the_summary_has_the_held_out_score_of_the_trained_policy_alone(tmp_path: Path) -> None:
    """Before RL it is what the warm start made, where there was one."""
    for warm_steps, first in ((0, "before"), (9, "after_warm_start")):
        logged = []
        for key in ("memory_off", "before", "after_warm_start", "after_rl"):
            observers, tracker, _ = observers_of(Seat())
            config = RunConfig(warm_start=WarmStartConfig(steps=warm_steps))
            folder = RunFolder(tmp_path / str(warm_steps) / key)
            asyncio.run(Scoreboard(spec_of(config), folder, observers).measure(key, 0, [Seat()]))
            logged += [key] if tracker.steps[0].get("Summary/held_out_f1") == 0.5 else []
        assert logged == [first, "after_rl"]


def test_a_run_without_memory_has_no_second_row_with_its_memory_off(tmp_path: Path) -> None:
    memory_off = MemoryConfig(policy="truncation")
    assert "memory_off" in evaluation_rows(RunConfig())
    assert "memory_off" not in evaluation_rows(RunConfig(memory=memory_off))
    seat = Seat()
    observers, _, _ = observers_of(seat)
    scores = Scoreboard(spec_of(RunConfig(memory=memory_off)), RunFolder(tmp_path), observers)
    asyncio.run(scores.measure("memory_off", 0, [seat]))
    assert seat.calls == []


def test_control_rows_are_the_runs_memory_with_other_cards() -> None:
    config = replace(RunConfig(), evaluation=EvaluationConfig(control_rows=True))
    rows = evaluation_rows(config)
    assert {key: rows[key].memory for key in ("oracle", "other_cards")} == {
        "oracle": replace(config.memory, control="oracle"),
        "other_cards": replace(config.memory, control="other_cards"),
    }
    assert not {"oracle", "other_cards"} & set(evaluation_rows(RunConfig()))
    summary = replace(config, memory=MemoryConfig(policy="summary"))
    assert "oracle" not in evaluation_rows(summary)  # it writes no flashcards


def test_a_control_that_the_environment_cannot_make_is_left_out_and_said(tmp_path: Path) -> None:
    seat, environment = Seat(), SimpleNamespace(name="recall", demonstrate_flashcards=print)
    observers, _, output = observers_of(seat)
    config = replace(RunConfig(), evaluation=EvaluationConfig(control_rows=True))
    spec = replace(spec_of(config), environment=environment)
    scores = Scoreboard(spec, RunFolder(tmp_path), observers)
    for key in ("oracle", "other_cards"):
        asyncio.run(scores.measure(key, 5, [seat]))
    assert seat.calls == [f"t{number}: oracle: gold cards" for number in range(3)]
    assert "no row 'control: other cards': the environment recall has no questions about" in output.getvalue()


# --- the end of the tracked run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (WorkerLost("worker-0 died"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (asyncio.CancelledError(), "KILLED"),
    ],
    ids=["done", "failed", "Ctrl-C", "SIGTERM"],
)
def test_the_tracked_run_ends_with_the_status_of_the_run(error: BaseException | None, status: str) -> None:
    statuses: list[str] = []
    tracker: Any = SimpleNamespace(finish=statuses.append)
    output = io.StringIO()
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, run.ending(tracker, Display(Console(file=output, width=160))):
        logging.getLogger("cluster.tracking").warning("the store is slow")
        if error is not None:
            raise error
    assert statuses == [status]
    assert output.getvalue() == "the store is slow\n"


@pytest.mark.parametrize(("resume", "step", "run_id"), [("auto", 2, "abc"), ("x", 4, "abc"), ("x", 2, "")])
def test_a_user_who_goes_back_by_name_gets_a_new_mlflow_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    resume: str,
    step: int,
    run_id: str,
) -> None:
    """Where the newest checkpoint is damaged, ``auto`` goes back too: its steps are made again."""
    for saved in (2, 4):
        checkpoint(tmp_path, saved, "x")
    opened = []

    def open_run(
        config: RunConfig, output: Path, name: str, file: Path, resumed: str, from_step: int
    ) -> Recorder:
        opened.append((resumed, from_step))
        return Recorder()

    monkeypatch.setattr(run, "start_tracking", open_run)
    loaded = load_checkpoint(tmp_path / "checkpoints" / f"step-{step:06d}")
    start = Start(loaded, replace(loaded.state, tracking_run_id="abc"), tmp_path)
    run._track(RunConfig(resume=resume), RunFolder(tmp_path), start)
    assert opened == [(run_id, step)]
    said = [line for line in caplog.messages if "go to a new MLflow run" in line]
    assert len(said) == (run_id == "")


@pytest.mark.parametrize("resume", ["auto", "its run", "/runs/x/checkpoints/step-000004"])
def test_a_checkpoint_that_cannot_be_loaded_is_passed_over_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resume: str, tmp_path: Path
) -> None:
    """With auto or a run the run goes on from the next one; a checkpoint that was named ends it."""
    if resume == "its run":
        (tmp_path / "config.yaml").write_text("")
        resume = str(tmp_path)
    damaged, asked = Path("/runs/x/checkpoints/step-000004"), list[list[Path]]()

    def prepare(_: RunConfig, refused: list[Path], say: Callable[[str], None]) -> tuple[str]:
        asked.append(list(refused))
        return ("older",) if refused else ("newer",)

    async def train(which: str, _: Display) -> None:
        if which == "newer":
            raise UnloadableError(damaged, "learner.json: not a learner checkpoint")

    monkeypatch.setattr(run, "prepare_training", prepare)
    monkeypatch.setattr(run, "train", train)
    config = RunConfig(resume=resume)
    if "checkpoints" not in resume:
        run.train_config(config, Display())
        assert asked == [[], [damaged]]
        assert (
            f"passes over a checkpoint: {damaged} cannot be loaded: learner.json" in capsys.readouterr().out
        )
    else:
        with pytest.raises(UnloadableError, match="step-000004 cannot be loaded"):
            run.train_config(config, Display())


def test_where_all_runs_are_finished_it_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(_: RunConfig, refused: list[Path], say: Callable[[str], None]) -> None:
        raise AllFinished("resume=auto: nothing is left to do")

    monkeypatch.setattr(run, "prepare_training", nothing)
    run.train_config(RunConfig(resume="auto"), Display())
    assert capsys.readouterr().out == "resume=auto: nothing is left to do\n"
