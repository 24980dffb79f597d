"""The reward as a weighted sum of named parts: the environment's, and those of a user's function."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path

import pytest

from actors.environments.build import build_environment
from actors.episodes.group_summary import GroupSummary
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.text.chat_template import ChatFormat
from actors.types import TrajectoryGroup
from cluster.common.tasks import TaskSource
from cluster.measure.row_metrics import row_metrics
from cluster.measure.rows import RowResult, TaskResult
from cluster.train.metrics import reward_metrics
from cluster.train.report import training_report
from configs.load import ConfigError, load_config
from configs.schema import EmbedderConfig, MemoryConfig, RolloutConfig, RunConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

ROOT = Path(__file__).parents[2]
MODULE = """
def parts(task, outcome): return {"length": len(outcome.answers[0].prediction), "two": 2}
def closeness(task, outcome): return 0.5
async def later(task, outcome): return {"late": 3.0}
def wrong(task, outcome): return {"length": float("nan")}
def text(task, outcome): return {"length": "long"}  # line 6
"""
SHORT = ["environment.recall.sessions=1", "environment.recall.questions=1"]


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_weighed.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def _config(weights: str, function: str = "") -> RunConfig:
    reward = f"my_weighed:{function}" if function else ""
    return load_config(
        None, [*SHORT, f"environment.reward={reward}", f"environment.reward_weights={weights}"]
    )


def _play(config: RunConfig, chat: ChatFormat, says: str = "Lisbon") -> TrajectoryGroup:
    environment = build_environment(config.environment, EmbedderConfig())
    policy = ScriptedPolicy(lambda ids, sampling, adapter: sampled(chat.reply(says)))
    parts = (policy, ScriptedWriter(), environment, chat, WriteConfig(), RolloutConfig())
    task = TaskSource(environment, "train", 0).at(0)
    request = RolloutRequest(task, "g", 2, MemoryConfig(policy="truncation"), 1.0, 16, seed=1)
    return asyncio.run(Rollout(*parts, 8, SURROUNDINGS, "b", "w").group(request))


def _reward(group: TrajectoryGroup) -> tuple[float, dict[str, float]]:
    assert not group.failed, group.failed
    outcome = group.trajectories[0].outcome
    return outcome.reward, dict(outcome.reward_parts)


def test_the_reward_is_the_weighted_sum_of_parts(chat: ChatFormat) -> None:
    plain, shown = _reward(_play(_config("{}"), chat))
    assert "environment" not in shown
    reward, parts = _reward(_play(_config("{f1: 2.0, environment: 1, em: -1}"), chat))
    assert reward == pytest.approx(2 * parts["f1"] + plain - parts["em"])
    assert parts["environment"] == plain and parts.items() >= shown.items()
    reward, parts = _reward(_play(_config("{length: 0.1, two: 1}", "parts"), chat))
    assert reward == pytest.approx(2.6) and (parts["length"], parts["two"]) == (6.0, 2.0)
    assert _reward(_play(_config("{closeness: 3, environment: 0}", "closeness"), chat))[0] == 1.5
    assert _reward(_play(_config("{late: 2}", "later"), chat))[0] == 6.0
    assert _reward(_play(_config("{}", "closeness"), chat))[0] == 0.5  # as without weights


@pytest.mark.parametrize(
    ("weights", "function", "said"),
    [
        ("{fluency: 1, f1: 1}", "", "environment.reward_weights names fluency; the outcome has .*em, .*f1"),
        ("{lenght: 1}", "parts", "environment.reward_weights names lenght; the outcome has .*length"),
        (
            "{}",
            "parts",
            "environment.reward=my_weighed:parts returned named parts: say in",
        ),
        (
            "{length: 1}",
            "wrong",
            "environment.reward=my_weighed:wrong returned length=nan: a reward",
        ),
        ("{length: 1}", "text", r"environment.reward=my_weighed:text: ValueError: could not convert"),
    ],
)
def test_a_part_that_is_not_there_fails_the_episode_with_one_line(
    chat: ChatFormat, weights: str, function: str, said: str
) -> None:
    failed = _play(_config(weights, function), chat).failed
    assert len(failed) == 2
    for each in failed:
        assert each.boundary == "environment" and re.search(said, each.message) and "\n" not in each.message


@pytest.mark.parametrize("weights", ["{f1: much}", "{f1: 0}", "{f1: true}", "{f1: .nan}"])
def test_weights_that_are_no_numbers_are_refused_at_the_start(weights: str) -> None:
    with pytest.raises(
        ConfigError, match=r"reward_weights.*a mapping of parts to numbers, one of them other"
    ):
        _config(weights)


def test_credit_by_question_has_no_weights() -> None:
    with pytest.raises(ConfigError, match=r"episode with environment.reward or reward_weights"):
        load_config(None, ["objective.credit=question", "environment.reward_weights={f1: 1}"])


def test_tables_and_figures_show_the_parts_and_the_sum(chat: ChatFormat) -> None:
    group = _play(_config("{length: 0.1, two: 1}", "parts"), chat)
    metrics = reward_metrics([GroupSummary.of(group)])
    assert metrics["reward/mean"] == pytest.approx(2.6)
    assert (metrics["reward/length"], metrics["reward/two"]) == (6.0, 2.0)
    row = RowResult.of("TMEM", [TaskResult.of(0, group)])
    assert row_metrics(row, "before")["eval/before/reward_part_length"] == 6.0
    (section,) = training_report({"before": row}, [], 0.0).document().sections
    (table,) = (table for table in section.tables if table.title == "Reward and its parts")
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert (cells["reward"], cells["length"], cells["two"]) == ("2.600", "6.000", "2.000")
    own = RowResult.of("TMEM", [TaskResult.of(0, _play(_config("{}"), chat))])
    (section,) = training_report({"before": own}, [], 0.0).document().sections
    assert "Reward and its parts" not in [table.title for table in section.tables]


def test_the_worked_example(tmp_path: Path, chat: ChatFormat) -> None:
    """The function and the settings of actors/README.md, played."""
    text = (ROOT / "actors" / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Several weighted rewards\n")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```(python|sh)\n(.*?)```", section, re.DOTALL))
    (tmp_path / "my_rewards.py").write_text(blocks["python"])
    words = shlex.split(blocks["sh"].replace("\\\n", " "))
    assert words[:3] == ["engram", "train", "quickstart"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", words[3:])
    reward, parts = _reward(_play(config, chat, "Lisbon please"))
    assert (parts["short"], parts["polite"]) == (1.0, 1.0)
    assert reward == pytest.approx(parts["f1"] + 0.1)
