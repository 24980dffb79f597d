"""Faults of a user's tasks and of what they build, in rows and stages."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actors.environments.build import build_environment
from actors.episodes.rollout import Rollout
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import Task, TrajectoryGroup
from cluster.common.errors import AllFailed
from cluster.common.tasks import TaskSource
from cluster.measure.rows import EvaluationRow, TaskResult, run_episodes
from cluster.train.demonstrations import Demonstrations
from configs.schema import EmbedderConfig, EnvironmentConfig, MemoryConfig, RunConfig, WarmStartConfig
from configs.user_code import ExtensionError, load_extension
from tests.unit.rollout_fakes import ScriptedPolicy
from tests.unit.test_user_code import REQUEST, _play, _rollout, _says, _shop, mine

__all__ = ["mine"]  # fixtures


def test_a_tasks_own_system_prompt_can_be_encoded(mine: Any) -> None:
    (task,) = TaskSource(_shop(kind="Prompts"), "train", 0).first(1)
    assert task.system_prompt == "Count\ufffd."


def test_a_task_that_cannot_be_made_is_a_failed_task(mine: Any, chat: ChatFormat) -> None:
    fault = "the environment shop's tasks: LookupError: no such shelf (my_env.py:102)"
    tasks = TaskSource(_shop(kind="Shops"), "train", 0)
    assert [(task.id, task.fault) for task in tasks.first(4)] == [
        ("shop-0", ""),
        ("shop-train-0-1", fault),
        ("shop-2", ""),
        ("shop-3", ""),
    ]
    assert [tasks.at(position).fault for position in (0, 1, 4, 5)] == ["", fault, fault, ""]
    assert tasks.at(6).id == "shop-0" and tasks.at(10).fault == fault  # the split repeats
    group = _play(chat, _shop(kind="Shops"), replace(REQUEST, task=tasks.at(1)))
    assert [(failed.boundary, failed.message) for failed in group.failed] == [("environment", fault)] * 3


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Unsent", r"shop's tasks: TypeError: cannot pickle '_thread\.lock' object \(my_env\.py:106\)"),
        ("Dicts", r"TypeError: it gave dict, not a Task of actors/types\.py \(my_env\.py:109\)"),
    ],
)
def test_where_no_task_can_be_made_nothing_starts(mine: Any, kind: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        TaskSource(_shop(kind=kind), "train", 0).first(3)


def test_an_environment_that_cannot_be_built_has_its_line(mine: Any) -> None:
    with pytest.raises(TaskError, match=r"environment\.custom=my_env:Broken: KeyError: 'shelves' \(my_env"):
        _shop(kind="Broken")
    with pytest.raises(ExtensionError, match=r"importing my_typo: SyntaxError: .*\(my_typo\.py:2\)"):
        load_extension("environment.custom", "my_typo:Shop")


@dataclass(frozen=True, eq=False)
class _Source:
    """A worker that plays episodes in this process."""

    rollout: Rollout
    name: str = "worker-0"

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        return await self.rollout.group(replace(REQUEST, task=task, group_id=task.id, group_size=1))


def _measure(chat: ChatFormat, session: str, tasks: int) -> tuple[list[TaskResult], str]:
    """Play a row; return what was kept, and the error that ended it."""
    kept: list[TaskResult] = []
    source = _Source(_rollout(chat, _shop(session), ScriptedPolicy(_says(chat))))
    row = EvaluationRow("TMEM before", MemoryConfig(policy="truncation"), 0)
    played = list(enumerate(TaskSource(_shop(), "eval", 0).first(tasks)))
    try:
        asyncio.run(run_episodes(row, played, [source], 2, kept.append))
    except AllFailed as error:
        return kept, str(error)
    return kept, ""


def test_a_row_goes_on_after_a_fault_and_ends_where_all_fail_alike(mine: Any, chat: ChatFormat) -> None:
    kept, error = _measure(chat, "Parses", 8)
    assert error == "" and sum(len(task.failed) for task in kept) == 1 and len(kept) == 8
    kept, error = _measure(chat, "AlwaysParses", 8)
    assert len(kept) < 8
    assert re.fullmatch(
        r"TMEM before: all \d episodes failed alike: environment: task shop-\d: the environment shop's act: "
        r"ValueError: invalid literal for int\(\) with base 10: 'three' \(my_env\.py:\d+\)",
        error,
    )


def test_a_warm_start_counts_tasks_that_fail_and_ends_where_all_do(mine: Any, model_path: Path) -> None:
    config = RunConfig(
        environment=EnvironmentConfig(name="custom", custom="my_env:Teaches"),
        memory=MemoryConfig(max_context_tokens=20, question_blind=True),
        warm_start=WarmStartConfig(steps=1, tasks_per_step=3),
    )
    teacher: Any = build_environment(config.environment, EmbedderConfig())
    demonstrations = Demonstrations(config, teacher, model_path)
    assert len(demonstrations.of_step(0)) == 2
    (fault,) = demonstrations.faults
    assert fault.startswith("task shop-0: the environment shop's demonstrate_flashcards: IndexError: ")
    teacher.lost = True
    with pytest.raises(
        TaskError, match=r"all 3 tasks of a warm start's step failed, the first: .*my_env\.py"
    ):
        demonstrations.of_step(1)
