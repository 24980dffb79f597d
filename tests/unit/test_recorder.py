"""The recorder: which episodes are kept, and what it costs where they cannot be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.episodes.group_summary import GroupSummary
from actors.text.chat_template import ChatFormat
from actors.types import FailedEpisode, Trajectory, TrajectoryGroup
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.stream import Batch
from cluster.inspection.background import Background
from cluster.inspection.record import FOLDER, EpisodeRecord, Record, list_records, load
from cluster.inspection.recorder import EpisodeRecorder
from cluster.measure.rows import EvaluationRow
from configs.schema import EpisodesConfig, MemoryConfig, RunConfig
from tests.unit.test_inspection import TASK, chat, play, record

__all__ = ["chat", "play", "record"]  # fixtures


def recorder(folder: Path, chat: ChatFormat, settings: EpisodesConfig) -> EpisodeRecorder:
    def fetch(content: object) -> TrajectoryGroup:
        if isinstance(content, str):
            raise RuntimeError(content)
        return content  # type: ignore[return-value]

    return EpisodeRecorder(settings, folder, chat, fetch, ())


def group_of(play: Callable[..., Trajectory], position: int) -> TrajectoryGroup:
    siblings = tuple(play(episode_id=f"train-{position}.{number}") for number in range(2))
    failed = (FailedEpisode(TASK.id, f"train-{position}.2", "receipt", "no"),)
    return TrajectoryGroup(TASK, 3, siblings, failed, "worker-0")


def test_the_recorder_keeps_what_the_settings_say(
    play: Callable[..., Trajectory], chat: ChatFormat, tmp_path: Path
) -> None:
    group = group_of(play, 4)
    finished: Any = FinishedGroup(GroupSummary.of(group), group)
    batch = Batch((4, 5), (finished, finished), (0, 0), 0)
    keeping = recorder(tmp_path, chat, EpisodesConfig(per_step=1, per_evaluation=1, failed=2))
    config = RunConfig()
    for step in (1, 2):
        keeping.on_batch(config, step, batch)
    for number in range(4):
        failed = (FailedEpisode(TASK.id, f"train-4.{number}", "receipt", "no"),)
        keeping.on_failures(config, 2, GroupSummary.of(replace(group, failed=failed)))
    row = EvaluationRow("TMEM before", MemoryConfig(question_blind=True), 7)
    for position in range(3):
        played = tuple(
            replace(each, episode_id=f"{position}-{each.episode_id}") for each in group.trajectories
        )
        keeping.on_evaluated(config, 0, position, row, replace(group, trajectories=played, failed=()))
    keeping.close(30)
    assert keeping.jobs.lost == 0
    kept: list[Record] = [load(path) for path in list_records(tmp_path)]
    episodes = [record for record in kept if isinstance(record, EpisodeRecord)]
    sources = sorted((record.origin.source, record.origin.step) for record in episodes)
    assert sources == [("evaluation", 0), ("evaluation", 0), ("train", 1), ("train", 2)]
    assert len([path for path in list_records(tmp_path) if "failed" in path.name]) == 2
    assert {record.siblings for record in episodes} == {(0.0, 0.0)}
    configs = {record.origin.config for record in kept}
    assert len(configs) == 2  # the row has settings of its own
    assert all((tmp_path / FOLDER / name).exists() for name in configs)


def test_siblings_are_kept_before_other_tasks(
    play: Callable[..., Trajectory], chat: ChatFormat, tmp_path: Path
) -> None:
    tasks = [group_of(play, version) for version in (4, 5, 6)]
    finished: Any = tuple(FinishedGroup(GroupSummary.of(group), group) for group in tasks)
    siblings = len(tasks[0].trajectories)
    keeping = recorder(tmp_path, chat, EpisodesConfig(per_step=siblings))
    keeping.on_batch(RunConfig(), 1, Batch((4, 5, 6), finished, (0, 0, 0), 0))
    keeping.close(30)
    kept = [load(path) for path in list_records(tmp_path)]
    assert len({record.episode_id for record in kept}) == siblings > 1
    assert len({record.episode_id.partition(".")[0] for record in kept}) == 1


def test_the_oldest_training_episodes_go_and_those_of_evaluations_stay(
    play: Callable[..., Trajectory], chat: ChatFormat, tmp_path: Path
) -> None:
    """Also what an earlier process of the run has kept."""
    row, settings = EvaluationRow("TMEM before", MemoryConfig(), 7), EpisodesConfig(per_step=1, keep=3)
    for steps in ((1, 2, 3), (4, 5)):
        keeping = recorder(tmp_path, chat, settings)
        for step in steps:
            group = group_of(play, step)
            finished = FinishedGroup(GroupSummary.of(group), group)  # type: ignore[arg-type]
            keeping.on_batch(RunConfig(), step, Batch((step,), (finished,), (0,), 0))
        keeping.on_evaluated(RunConfig(), 0, 0, row, replace(group_of(play, steps[0]), failed=()))
        keeping.close(30)
    kept = [(load(path).origin.source, load(path).origin.step) for path in list_records(tmp_path)]
    training = [step for source, step in kept if source == "train"]
    assert training == [3, 4, 5] and len(kept) == 3 + 4


def test_what_cannot_be_kept_is_counted_and_said_once(
    play: Callable[..., Trajectory], chat: ChatFormat, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = group_of(play, 4)
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    keeping = recorder(tmp_path, chat, EpisodesConfig(per_step=1))
    for step, content in enumerate(("the object is lost", group), start=1):
        finished = FinishedGroup(GroupSummary.of(group), content)  # type: ignore[arg-type]
        keeping.on_batch(RunConfig(), step, Batch((4,), (finished,), (0,), 0))
    keeping.close(30)
    assert keeping.jobs.lost == 2
    said = [line.getMessage() for line in caplog.records if "to be kept" in line.getMessage()]
    kept = f"warning: 2 episodes that were to be kept in {tmp_path / FOLDER} are not"
    assert said == [f"{kept} (RuntimeError: the object is lost)"]


def test_work_that_hangs_costs_what_waits_behind_it() -> None:
    begun, released = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.set()
        released.wait(20)

    hanging = Background("hanging", work, str, most_waiting=2)
    hanging.submit(0)
    assert begun.wait(20)
    before = time.monotonic()
    for item in range(1, 4):
        hanging.submit(item)
    assert (hanging.lost, hanging.problem) == (1, "more came than it could take")
    hanging.close(0.05)
    assert time.monotonic() - before < 5
    assert (hanging.lost, hanging.done) == (3, 0)
    released.set()
