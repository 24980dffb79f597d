"""What a warm start is taught at each step, and what it refuses before a run starts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors.environments.recall import RecallEnvironment
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import Segment
from cluster.train.demonstrations import Demonstrations
from cluster.train.prepare import prepare_training
from configs.schema import EnvironmentConfig, MemoryConfig, RecallConfig, RunConfig, WarmStartConfig

CONFIG = RunConfig(
    environment=EnvironmentConfig(recall=RecallConfig(sessions=1, facts_per_session=2, questions=1)),
    memory=MemoryConfig(max_context_tokens=30, question_blind=True),
    warm_start=WarmStartConfig(steps=3, tasks_per_step=2),
)


def _segments(model_path: Path, unknown: int, step: int) -> list[Segment]:
    config = replace(CONFIG, warm_start=replace(CONFIG.warm_start, unknown=unknown))
    environment = RecallEnvironment(config.environment.recall)
    return Demonstrations(config, environment, model_path).of_step(step)


def _ids(segments: list[Segment]) -> list[list[int]]:
    return [segment.token_ids.tolist() for segment in segments]


def test_what_is_unknown_is_taught_beside_the_flashcards_with_a_told_twin(
    model_path: Path, chat: ChatFormat
) -> None:
    flashcards = _segments(model_path, 0, step=1)
    segments = _segments(model_path, 3, step=1)
    assert len(flashcards) == 2  # one text in each of two tasks
    assert _ids(segments[: len(flashcards)]) == _ids(flashcards)  # the setting adds, and changes nothing
    answers = segments[len(flashcards) :]
    replies = [chat.decode(segment.token_ids[segment.action_mask]) for segment in answers]
    assert len(answers) == 6 and replies[::2] == ["I don't know."] * 3
    for untold, told, reply in zip(answers[::2], answers[1::2], replies[1::2], strict=True):
        first, second = (chat.turns(segment.token_ids.tolist()) for segment in (untold, told))
        assert first[-2].text == second[-2].text  # the same question
        assert reply in " ".join(turn.text for turn in second[:-1])
        assert reply not in " ".join(turn.text for turn in first[:-1])
        assert first[0].text == second[0].text == RecallEnvironment.system_prompt
    assert _ids(answers) != _ids(_segments(model_path, 3, step=2)[len(flashcards) :])
    assert _ids(segments) == _ids(_segments(model_path, 3, step=1))


def test_each_purpose_has_tasks_of_its_own(model_path: Path) -> None:
    environment = RecallEnvironment(CONFIG.environment.recall)
    warm, control = (
        Demonstrations(CONFIG, environment, model_path, purpose) for purpose in ("warm start", "c")
    )
    assert _ids(warm.of_step(0)) == _ids(_segments(model_path, 0, step=0))
    taught = {tuple(ids) for step in range(3) for ids in _ids(warm.of_step(step))}
    assert not taught & {tuple(ids) for step in range(3) for ids in _ids(control.of_step(step))}


@pytest.mark.parametrize(
    ("reward", "settings", "problem"),
    [
        (
            "",
            {"unknown": 4},
            r"warm_start\.unknown=4 is not possible: cards demonstrates no question .*unknown=0",
        ),
        ("", {"wordings": 2}, r"memory\.wordings=2 is not possible with a warm start: cards .*wordings=1,"),
        ("my_cards:reward", {"unknown": 4}, r"warm_start\.unknown=4 is not possible"),
    ],
)
def test_what_an_environment_cannot_teach_is_refused_before_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: str, settings: dict[str, int], problem: str
) -> None:
    (tmp_path / "my_cards.py").write_text(_MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_cards", raising=False)
    config = replace(
        CONFIG,
        output_dir=str(tmp_path / "runs"),
        environment=EnvironmentConfig(name="custom", custom="my_cards:Cards", reward=reward),
        memory=replace(CONFIG.memory, wordings=settings.get("wordings", 1)),
        warm_start=replace(CONFIG.warm_start, unknown=settings.get("unknown", 0)),
    )
    with pytest.raises(TaskError, match=problem) as caught:
        prepare_training(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


_MODULE = """
from actors.types import Task

class Cards:
    name, system_prompt = "cards", "Remember."
    def __init__(self, options): pass
    def tasks(self, split, seed, start): return iter([Task("a", "cards", {}, 0)])
    def start(self, task): raise NotImplementedError
    def demonstrate_flashcards(self, task, text_in_context, question_blind): return ()

def reward(task, outcome): return 0.0
"""
