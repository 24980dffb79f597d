"""A user's own parts: environment, reward, memory and advantage estimator, and the message when one does not
fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors.environments.base import Abstainer, Attributor, Demonstrator, Questioner, Rephraser, prepare
from actors.environments.build import build_environment
from actors.memory.build import build_memory, surroundings
from actors.protocols import TaskError
from actors.types import Flashcard
from configs.learning import ADVANTAGES
from configs.load import ConfigError, load_config, to_yaml
from configs.schema import EmbedderConfig, EnvironmentConfig, MemoryConfig, ObjectiveConfig, WriteConfig
from configs.user_code import ExtensionError, load_extension
from learner.advantage import estimator, score
from learner.types import LearnerError
from tests.unit.cluster_cases import group, task_at

MODULE = """
from actors.memory.base import TruncationMemory

class Shop:
    name, system_prompt = "shop", "Count."
    def __init__(self, options): self.days = options["days"]
    def tasks(self, split, seed, start): return iter(())
    def start(self, task): raise NotImplementedError

class Library(Shop):
    shelves = 0
    def prepare(self): self.shelves += self.days

class Half:
    name = "half"
    def __init__(self, options): pass

def short(config, write, around): return TruncationMemory(config.options["tokens"])
def length(task, outcome): return float(len(task.id))
def broken(task, outcome): raise KeyError("price")
def endless(task, outcome): return float("inf")
def ranks(rewards): return [float(sorted(rewards).index(reward)) for reward in rewards]
def too_few(rewards): return rewards[1:]
number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_parts.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "my_broken.py").write_text("import a_package_that_nobody_has", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_parts", None)


def test_an_environment_with_its_options_and_a_reward() -> None:
    config = EnvironmentConfig(name="custom", custom="my_parts:Shop", options={"days": 3})
    environment = build_environment(config, EmbedderConfig())
    assert environment.name == "shop" and environment.days == 3  # type: ignore[attr-defined]
    assert build_environment(EnvironmentConfig(reward="my_parts:length"), EmbedderConfig()).name == "recall"


def test_a_users_reward_takes_the_place_of_the_environments() -> None:
    environment = build_environment(EnvironmentConfig(reward="my_parts:length"), EmbedderConfig())
    task = next(environment.tasks("eval", 0, 0))
    session = environment.start(task)
    while (observation := session.observe()) is not None:
        if observation.wants_action:
            session.act("nothing")
    outcome = session.outcome()
    assert outcome.reward == len(task.id)
    assert outcome.reward_parts["environment"] == outcome.reward_parts["f1"]
    # A warm start still finds what the environment demonstrates.
    assert environment.demonstrate_flashcards(task, "", False) == ()  # type: ignore[attr-defined]


def test_a_users_reward_keeps_the_optional_parts_of_the_environment_and_adds_none() -> None:
    parts = (Demonstrator, Rephraser, Abstainer, Questioner, Attributor)
    recall = build_environment(EnvironmentConfig(reward="my_parts:length"), EmbedderConfig())
    assert all(isinstance(recall, part) for part in parts)
    plain = build_environment(EnvironmentConfig(), EmbedderConfig())
    assert isinstance(recall, Questioner) and isinstance(plain, Questioner)
    assert recall.other_questions(5, 1) == plain.other_questions(5, 1)
    card = Flashcard("Where does Nora live?", "Lisbon")
    assert recall.questions_beside(card, ()) == plain.questions_beside(card, ())
    assert isinstance(recall, Attributor) and isinstance(plain, Attributor)
    task = next(plain.tasks("train", 0, 0))
    fact = task.payload["facts"][0]
    asked = Flashcard(fact["question"], fact["answer"])
    assert recall.use_of(task, asked) == plain.use_of(task, asked)
    assert recall.questions_told(task, fact["sentence"]) == plain.questions_told(task, fact["sentence"])
    config = EnvironmentConfig(name="custom", custom="my_parts:Shop", options={"days": 3})
    shop = build_environment(replace(config, reward="my_parts:length"), EmbedderConfig())
    assert not any(isinstance(shop, part) for part in parts)


@pytest.mark.parametrize("reward", ["", "my_parts:length"])
def test_a_users_environment_may_have_something_to_prepare(reward: str) -> None:
    config = EnvironmentConfig(name="custom", custom="my_parts:Library", options={"days": 3}, reward=reward)
    library = build_environment(config, EmbedderConfig())
    prepare(library)
    assert getattr(library, "inner", library).shelves == 3
    prepare(build_environment(replace(config, custom="my_parts:Shop"), EmbedderConfig()))  # has nothing


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", r": KeyError: 'price' \(my_parts\.py:20\)$"),
        ("endless", " returned inf: a reward is a finite number"),
    ],
)
def test_a_reward_that_fails_fails_its_episode(name: str, said: str) -> None:
    environment = build_environment(EnvironmentConfig(reward=f"my_parts:{name}"), EmbedderConfig())
    task = next(environment.tasks("eval", 0, 0))
    with pytest.raises(TaskError, match=rf"task {task.id}: environment\.reward=my_parts:{name}{said}"):
        environment.start(task).outcome()


def test_a_users_memory() -> None:
    config = MemoryConfig(policy="custom", custom="my_parts:short", options={"tokens": 40})
    memory = build_memory(config, WriteConfig(), surroundings(512, 16, EmbedderConfig()))
    assert type(memory).__name__ == "TruncationMemory"


def test_advantages() -> None:
    siblings = group(task_at(0), 0, rewards=(1.0, 0.0, 0.5))
    advantages = {
        name: [episode.advantage for episode in score(siblings, estimator(ObjectiveConfig(advantage=name)))]
        for name in (*ADVANTAGES, "my_parts:ranks")
    }
    assert advantages["my_parts:ranks"] == [2.0, 0.0, 1.0]
    assert advantages["rloo"] == pytest.approx([0.75, -0.75, 0.0])
    assert advantages["grpo"] == pytest.approx([1.2247, -1.2247, 0.0], abs=1e-4)
    assert advantages["positive"] == pytest.approx([1.2247, 0.0, 0.0], abs=1e-4)
    rewards = r"for the rewards \[1\.0, 0\.0, 0\.5\] of task t0"
    with pytest.raises(LearnerError, match=rf"objective\.advantage gave \[0\.0, 0\.5\] {rewards}"):
        score(siblings, estimator(ObjectiveConfig(advantage="my_parts:too_few")))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("my_parts.Shop", "is not allowed: write package.module:name"),
        ("no_such:thing", "there is no module no_such: start from the folder that holds it"),
        (
            "my_parts:shop",
            "my_parts has no function or class shop; it has Half, Library, Shop, TruncationMemory",
        ),
        ("my_parts:number", "my_parts has no function or class number"),
        ("my_broken:thing", "my_broken imports a_package_that_nobody_has, which is not installed here"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(path: str, said: str) -> None:
    with pytest.raises(ExtensionError, match=said) as caught:
        load_extension("environment.custom", path)
    assert "\n" not in str(caught.value)


def test_an_environment_that_is_none_is_said() -> None:
    lacks = "my_parts:Half returned Half without system_prompt, tasks, start: see Environment in"
    with pytest.raises(ExtensionError, match=lacks):
        build_environment(EnvironmentConfig(name="custom", custom="my_parts:Half"), EmbedderConfig())


def test_options_are_a_mapping_in_files_and_arguments(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "environment:\n  name: custom\n  custom: my_parts:Shop\n  options:\n    days: 3\n    names: [a, b]\n",
        encoding="utf-8",
    )
    config = load_config(file, ["environment.options={days: 4}"])
    assert config.environment.options == {"days": 4, "names": ["a", "b"]}
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(again, []) == config
    inside = load_config(file, ["environment.options.days=5", "environment.options.deep.er=[1]"])
    assert inside.environment.options == {"days": 5, "names": ["a", "b"], "deep": {"er": [1]}}
    with pytest.raises(ConfigError, match=r"environment\.options=3 is not allowed: it must be a mapping"):
        load_config(file, ["environment.options=3"])
    allowed = r"it must be package\.module:name where environment\.name is custom"
    with pytest.raises(ConfigError, match=rf"environment\.custom='' is not allowed: {allowed}"):
        load_config(None, ["environment.name=custom"])
