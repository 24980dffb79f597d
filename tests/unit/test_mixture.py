"""Several environments in one run: the draw, who plays a task, each one's figures, the worked example."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.environments.base import Attributor, Demonstrator, Questioner
from actors.environments.build import build_environment
from actors.environments.mixture import Mixed, MixedEnvironment, mixed
from actors.episodes.group_summary import GroupSummary
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.peak_memory import PeakMemory
from actors.text.chat_template import ChatFormat
from actors.types import Task, TrajectoryGroup
from cluster.common.tasks import TaskSource
from cluster.evaluation.report import _environment_table
from cluster.evaluation.store import CellResult
from cluster.evaluation.summary import RowSummary
from cluster.measure.row_metrics import row_metrics
from cluster.measure.rows import RowResult, TaskResult, primary_score
from cluster.train.curriculum import Curriculum
from cluster.train.metrics import mix_metrics
from cluster.train.report import training_report
from configs.curriculum import stages
from configs.load import ConfigError, Layer, load_config, to_yaml
from configs.mixture import members
from configs.schema import EmbedderConfig, MemoryConfig, RolloutConfig, RunConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

ROOT = Path(__file__).parents[2]


class Numbers:
    """Tasks 0, 1, 2, ...; ``train`` and ``held`` of them."""

    system_prompt = "Count."

    def __init__(self, name: str, train: int = 10**9, held: int = 10**9) -> None:
        self.name, self.sizes = name, {"train": train, "eval": held}

    def tasks(self, split: str, seed: int, start: int) -> Iterator[Task]:
        for number in range(start, self.sizes[split]):
            yield Task(f"{self.name}-{split}-{number}", self.name, {"number": number}, 0)

    def start(self, task: Task) -> Any:
        raise NotImplementedError


def _numbers(*given: tuple[str, float, Numbers]) -> Any:
    return mixed([Mixed(name, share, environment) for name, share, environment in given])


def _drawn(environment: Any, split: Any, count: int, seed: int = 1, start: int = 0) -> list[tuple[str, int]]:
    tasks = itertools.islice(environment.tasks(split, seed, start), count)
    return [(task.member, task.payload["number"]) for task in tasks]


def test_every_stretch_keeps_to_the_shares_and_takes_each_members_tasks_in_turn() -> None:
    environment = _numbers(("a", 0.6, Numbers("a")), ("b", 0.3, Numbers("b")), ("c", 0.1, Numbers("c")))
    drawn = _drawn(environment, "train", 1000)
    for end in range(1, 1001):
        counts = {name: sum(member == name for member, _ in drawn[:end]) for name in "abc"}
        assert all(
            abs(counts[name] - share * end) < 2 for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1))
        )
    for name in "abc":
        own = [number for member, number in drawn if member == name]
        assert own == list(range(len(own)))
    assert drawn != _drawn(environment, "train", 1000, seed=2)


def test_a_resumed_run_goes_on_with_the_same_stream() -> None:
    def made() -> Any:
        return _numbers(("a", 0.7, Numbers("a")), ("b", 0.3, Numbers("b", train=3)))

    whole = TaskSource(made(), "train", 5)
    ids = [whole.at(position).id for position in range(40)]
    assert len(set(ids)) == 40  # also where the three tasks of b come again
    resumed = TaskSource(made(), "train", 5)
    assert [resumed.at(position).id for position in range(17, 40)] == ids[17:]
    numbers = [number for member, number in _drawn(made(), "train", 40) if member == "b"]
    assert numbers == [0, 1, 2] * 4


def test_in_the_eval_split_a_member_without_more_tasks_drops_out() -> None:
    environment = _numbers(("a", 0.5, Numbers("a", held=2)), ("b", 0.5, Numbers("b", held=5)))
    drawn = _drawn(environment, "eval", 100)
    assert sorted(drawn) == [("a", 0), ("a", 1), *(("b", number) for number in range(5))]
    assert _drawn(environment, "eval", 100, start=4) == drawn[4:]
    assert len(TaskSource(environment, "eval", 1).first(100)) == 7


class Broken(Numbers):
    """Its second task cannot be made."""

    def tasks(self, split: str, seed: int, start: int) -> Iterator[Task]:
        for task in super().tasks(split, seed, start):
            if task.payload["number"] == 1:
                raise RuntimeError("no such file")
            yield task


def test_a_task_that_cannot_be_made_is_counted_as_its_environments() -> None:
    environment = _numbers(("a", 0.5, Numbers("a", held=3)), ("b", 0.5, Broken("b", held=3)))
    tasks = TaskSource(environment, "eval", 1).first(6)
    faulty = [(task.member, task.fault) for task in tasks if task.fault]
    ((member, fault),) = faulty
    assert member == "b" and "the environment b's tasks: RuntimeError: no such file" in fault
    results = [
        TaskResult(place, 0, (), (task.fault or "engine: late",), task.member)
        for place, task in enumerate(tasks)
    ]
    row = RowResult.of("row", results)
    assert row.members == ("a", "b")
    assert row.of_member("a").failed == ("engine: late",) * 3 and fault in row.of_member("b").failed


def test_ids_differ_where_one_name_begins_another() -> None:
    environment = _numbers(("rec", 0.5, Numbers("recall")), ("recall", 0.5, Numbers("recall")))
    ids = [task.id for task in itertools.islice(environment.tasks("train", 1, 0), 20)]
    assert len(set(ids)) == 20


def test_a_layer_that_names_an_environment_ends_the_mix_and_its_weights(tmp_path: Path) -> None:
    path, layer = tmp_path / "run.yaml", tmp_path / "benchmark.yaml"
    mix = [{"share": 1, "environment": {"name": "recall"}}]
    path.write_text(json.dumps({"environment": {"mix": mix, "reward_weights": {"f1": 1.0}}}))
    layer.write_text("environment: {name: recall, recall: {sessions: 1}}")
    config = load_config(path, [], [Layer(layer, "benchmark", ("environment.",))])
    assert not config.environment.mix and not config.environment.reward_weights
    given = load_config(path, ["environment.reward_weights={em: 1}"])
    assert given.environment.reward_weights == {"f1": 1.0, "em": 1.0}  # mappings are merged
    assert not load_config(path, ["environment.reward_weights={}"]).environment.reward_weights


def _config(tmp_path: Path, mix: list[dict[str, Any]], *arguments: str, **more: object) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"environment": {"mix": mix, **more}}))
    return load_config(path, arguments)


SHORT = {"recall": {"sessions": 1, "facts_per_session": 1, "questions": 1, "filler_sentences": 0}}


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ([{"share": 0}], r"mix\[0\]: share=0 is not allowed: it must be a number above 0"),
        ([{"environment": {}}], r"mix\[0\]: share=None is not allowed"),
        ([{"share": 1, "weight": 2}], "'weight' is no key of it; it may have share, name, environment"),
        ([{"share": 1}, {"share": 1}], r"mix\[1\]: 'recall' is there already; give it a name of its own"),
        ([{"share": 1, "environment": {"recal": {}}}], r"mix\[0\]: 'environment\.recal' is no setting"),
        ([{"share": 1, "name": "a/b"}], "name='a/b' is not allowed"),
        ([{"share": 1, "environment": {"mix": []}}], "without mix"),
        ([{"share": 1, "environment": {"name": "search"}}], r"mix\[0\]: environment\.search\.questions_path"),
        (
            [{"share": 1, "environment": {"recall": {"questions": 99, "sessions": 99}}}],
            r"mix\[0\]: environment\.recall\.questions=99 is not allowed: it must be at most rollout",
        ),
    ],
)
def test_a_mix_that_cannot_be_is_one_line(tmp_path: Path, mix: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        _config(tmp_path, mix)
    assert "\n" not in str(raised.value)


def test_a_mix_has_the_optional_parts_that_all_of_its_members_have(tmp_path: Path) -> None:
    both = [{"share": 1, "name": "a", "environment": SHORT}, {"share": 1, "name": "b"}]
    environment: Any = build_environment(_config(tmp_path, both).environment, EmbedderConfig())
    assert isinstance(environment, MixedEnvironment)
    assert isinstance(environment, Demonstrator) and isinstance(environment, Attributor)
    assert isinstance(environment, Questioner) and len(set(environment.other_questions(8, 0))) == 8
    task = next(task for task in environment.tasks("train", 0, 0) if task.member == "a")
    told = task.payload["sessions"][0]
    text = told if isinstance(told, str) else json.dumps(told)
    assert environment.demonstrate_flashcards(task, text, False) == environment.members[
        "a"
    ].demonstrate_flashcards(task, text, False)
    alone = _numbers(("a", 1, Numbers("a")), ("b", 1, environment.members["a"]))
    assert not isinstance(alone, Demonstrator)


MODULE = """
from actors.environments.base import Observation
from actors.types import Outcome, Task

class Session:
    question = "More?"
    def __init__(self): self.turns = 1
    def observe(self): return Observation("More?", True) if self.turns else None
    def act(self, text):
        self.turns = 0
        if text == "fail": raise ValueError("no more")
    def outcome(self): return Outcome(2.0, {"style": 0.5}, ())

class Rewards:
    name, system_prompt = "rewards", "Only say more."
    def __init__(self, options): pass
    def tasks(self, split, seed, start):
        for number in range(start, 6): yield Task(f"r{split}{number}", "rewards", {"n": number}, 0)
    def start(self, task): return Session()
"""


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    (tmp_path / "mix_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"name": "custom", "custom": "mix_mine:Rewards"}
    return _config(
        tmp_path, [{"share": 3, "environment": SHORT}, {"share": 1, "name": "mine", "environment": own}]
    )


def _groups(config: RunConfig, chat: ChatFormat, split: Any, count: int, says: str) -> list[TrajectoryGroup]:
    environment = build_environment(config.environment, EmbedderConfig())
    policy = ScriptedPolicy(lambda ids, sampling, adapter: sampled(chat.reply(says)))
    parts = (policy, ScriptedWriter(), environment, chat, WriteConfig(), RolloutConfig())
    rollout = Rollout(*parts, 8, SURROUNDINGS, "b", "w")
    memory = MemoryConfig(policy="truncation")

    async def play() -> list[TrajectoryGroup]:
        tasks = TaskSource(environment, split, 0).first(count)
        requests = [RolloutRequest(task, f"g{n}", 2, memory, 1.0, 16, seed=n) for n, task in enumerate(tasks)]
        return list(await asyncio.gather(*map(rollout.group, requests)))

    return asyncio.run(play())


def test_each_task_is_played_by_its_own_environment(two: RunConfig, chat: ChatFormat) -> None:
    groups = _groups(two, chat, "train", 8, "Lisbon")
    assert [group.task.member for group in groups].count("mine") == 2
    for group in groups:
        (first, _), mine = group.trajectories, group.task.member == "mine"
        shown = chat.decode(int(i) for i in first.segments[0].token_ids)
        assert ("Only say more." in shown) is mine
        assert (first.outcome.reward == 2.0) is mine

    summaries = [GroupSummary.of(group) for group in groups]
    metrics = mix_metrics(summaries, {"mine": 3, "gone": 2})
    assert (metrics["mix/mine_mean"], metrics["mix/mine_style"], metrics["mix/mine_groups"]) == (2.0, 0.5, 2)
    assert metrics["mix/recall_episodes"] == 12 and metrics["mix/recall_mean"] < 1
    failed = {name: value for name, value in metrics.items() if name.endswith("failed_episodes")}
    assert failed == {"mix/mine_failed_episodes": 3, "mix/recall_failed_episodes": 0} | {
        "mix/gone_failed_episodes": 2  # an environment whose groups all fail is in no batch, and is told
    }
    assert (metrics["mix/gone_groups"], math.isnan(metrics["mix/gone_mean"])) == (0, True)
    assert mix_metrics([replace(summary, member="") for summary in summaries], {}) == {}
    odd = replace(summaries[0].episodes[0].outcome, reward_parts={"groups": 7.0})
    named = replace(summaries[0], episodes=(replace(summaries[0].episodes[0], outcome=odd),))
    figures = mix_metrics([named], {})
    member = summaries[0].member
    assert (figures[f"mix/{member}_groups"], figures[f"mix/{member}_part_groups"]) == (1.0, 7.0)


def test_an_evaluation_shows_each_environment_and_all_together(two: RunConfig, chat: ChatFormat) -> None:
    played = [*_groups(two, chat, "eval", 4, "Lisbon"), *_groups(two, chat, "eval", 8, "fail")[4:]]
    row = RowResult.of("TMEM", [TaskResult.of(place, group) for place, group in enumerate(played)])
    assert row.members == ("mine", "recall") and len(row.failed) == len(row.failed_members) == 2
    assert len(row.of_member("mine").episodes) == 2 and len(row.of_member("recall").failed) == 0
    assert primary_score(row.episodes) == "reward"  # mine has no answers
    figures = row_metrics(row, "after_rl")
    assert (figures["eval/after_rl/mine_reward"], figures["eval/after_rl/mine_failed_episodes"]) == (2.0, 2)
    assert "eval/after_rl/recall_f1" in figures and "eval/after_rl/mine_f1" not in figures

    (section,) = training_report({"after_rl": row}, [], 0.0).document().sections
    together, apart = section.tables[:2]
    assert together.rows[0][:3] == ("TMEM", "14", "2")
    assert apart.title == "Scores by environment" and apart.header[:4] == (
        "row",
        "environment",
        "tasks",
        "failed",
    )
    assert [line[:4] for line in apart.rows] == [("TMEM", "mine", "2", "2"), ("TMEM", "recall", "12", "0")]
    reward = apart.header.index("reward [95% CI]")
    assert apart.rows[0][reward].startswith("2.000")

    cell = CellResult(row, PeakMemory(1, 0, ""))
    table = _environment_table([RowSummary("mix", "TMEM", 64, ((0, cell),), ())])
    assert [(line[1], line[3]) for line in table.rows] == [("mine", "2"), ("recall", "0")]


def test_a_stage_of_the_curriculum_may_have_a_mix_of_its_own(tmp_path: Path) -> None:
    mix = [{"share": 1, "name": "easy", "environment": SHORT}, {"share": 1, "name": "hard"}]
    own = json.dumps([{"environment": {"mix": mix}, "steps": 2}, {"environment": {"mix": []}}])
    config = _config(tmp_path, [{"share": 1}], f"curriculum.stages={own}")
    first, second = stages(config)
    assert [member.name for member in members(first.environment)] == ["easy", "hard"]
    assert second.environment.mix == ()
    environments = [build_environment(stage.environment, EmbedderConfig()) for stage in (first, second)]
    sources = [TaskSource(environment, "train", 0).at for environment in environments]
    curriculum = Curriculum(sources[0], (first, second), sources)
    task = curriculum.task_at(0)
    assert task.stage == 1 and task.member in ("easy", "hard")
    wrong = json.dumps([{"environment": {"mix": [{"share": -1}]}}])
    with pytest.raises(ConfigError, match=r"mix\[0\]: share=-1"):
        _config(tmp_path, [{"share": 1}], f"curriculum.stages={wrong}")


def test_the_worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: ChatFormat) -> None:
    """The file of actors/README.md, loaded, drawn from and played."""
    text = (ROOT / "actors" / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Several environments in one run\n")[1].split("\n## ")[0]
    block = re.search(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert block is not None and yaml.safe_load(block[1])
    (tmp_path / "mixed.yaml").write_text(block[1])
    records = [{"texts": [f"Nora has {n} lamps."], "question": "How many?", "answer": n} for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "mixed.yaml", [])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml", []) == config
    groups = _groups(config, chat, "train", 10, "Lisbon")
    assert [group.task.member for group in groups].count("mine") == 3
    assert all(len(group.trajectories) == 2 for group in groups)
