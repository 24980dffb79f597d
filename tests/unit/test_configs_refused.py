"""What a configuration is refused for: one line that names the place, and the cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config, to_yaml
from configs.schema import EnvironmentConfig, LearnerConfig
from tests.unit.test_configs import refused, yaml_file

__all__ = ["yaml_file"]  # fixtures


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "did you mean train.steps?"),
        ("group_size=3", "did you mean train.group_size?"),
        ("--train.steps=3", "did you mean train.steps"),
        ("xyzzy=1", "--settings lists all of them"),
        ("train.steps", "write key=value, e.g. train.steps=..."),
        ("train=3", "train is a section"),
        ("train.steps=abc", "train.steps='abc' is not allowed: it must be a whole number"),
        ("train.steps=1.5", "a whole number"),
        ("train.steps=true", "a whole number"),
        ("train.steps=", "a whole number"),
        ("train.steps=null", "a whole number"),
        ("train.steps=???", "a whole number"),
        ("train.steps=[1", "cannot be read"),
        ("train.steps=${nope}", "nope"),
        ("model.trust_remote_code=maybe", "true or false"),
        ("environment.name=chess", "one of recall, conversation"),
        ("learner.zero_stage=4", "one of 0, 1, 2, 3"),
        ("fast_weights.projections=[q_proj]", "one of gate_proj, up_proj, down_proj"),
        (
            "fast_weights.projections=[up_proj,up_proj]",
            "fast_weights.projections=('up_proj', 'up_proj') is not allowed",
        ),
        (
            "environment.conversation.categories=[1,9]",
            "environment.conversation.categories=(1, 9) is not allowed",
        ),
        ("learner.lora_rank=0", "learner.lora_rank=0 is not allowed: it must be greater than 0"),
        (
            "learner.lora_targets=[lm_head]",
            "('lm_head',) is not allowed: it must be one or more of q_proj, k_",
        ),
        ("learner.lora_targets=[up_proj,up_proj]", "learner.lora_targets=('up_proj', 'up_proj') is not"),
        ("learner.lora_targets=[]", "learner.lora_targets=() is not allowed"),
        ("train.steps=-1", "train.steps=-1 is not allowed: it must be 0 or more"),
        ("learner.learning_rate=.nan", "learner.learning_rate=nan is not allowed"),
        ("train.group_size=1", "train.group_size=1 is not allowed: it must be 2 or more; advantages compare"),
        ("memory.max_context_tokens=9000", "engine.max_model_tokens=8192 is not allowed"),
        ("environment.name=conversation", "environment.conversation.path='' is not allowed"),
        (
            "rollout.max_turns=1",
            "environment.recall.questions=2 is not allowed: it must be at most rollout.max_turns=1; what",
        ),
        (
            "evaluation.bootstrap_samples=99",
            "evaluation.bootstrap_samples=99 is not allowed: it must be 100 or more; a 95 %",
        ),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(override: str, expected: str) -> None:
    message = refused(None, override)
    assert message.startswith(f"argument {override!r}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train:\n  steps: 3\n  stepz: 4\n", ": 'train.stepz' is no setting; did you mean train.steps?"),
        (b"train: 4\n", ": train is a section"),
        (b"train:\n  steps: {a: 1}\n", ": train.steps={'a': 1} is not allowed"),
        (b"fast_weights: {projections: {a: 1}}", ": fast_weights.projections={'a': 1} is not allowed"),
        (b"environment: {options: {1: a}}", "write its key 1 in quotes"),
        (b"environment: {options: {a: '???'}}", "Missing mandatory value: a"),
        (b"learner: {zero_stage: true}", ": learner.zero_stage=True is not allowed: it must be one of 0, 1"),
        (b"train:\n  steps: -2\n", ": train.steps=-2 is not allowed: it must be 0 or more"),
        (b"name: a\nname: b\n", ", line 2, column 1: while constructing a mapping, found duplicate key name"),
        (b"train: [1\n", ", line 2, column 1: "),
        (b"\ttrain: 1\n", ", line 1, column 1: "),
        (b"- train\n", ": holds a list"),
        (b"3\n", ": holds no mapping"),
        (b"name: \xff\n", ": is not UTF-8 text (byte 6)"),
        (b"name: \x00\n", ": character 7 is 0"),
        (b"name: !!python/name:os.system x\n", ", line 1, column 7: "),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_place(yaml_file: Path, content: bytes, expected: str) -> None:
    yaml_file.write_bytes(content)
    message = refused(yaml_file)
    assert message.startswith(str(yaml_file)) and expected in message


def test_a_missing_file_lists_the_shipped_ones(tmp_path: Path) -> None:
    assert "no such file; shipped are chat, locomo" in refused(tmp_path / "none.yaml")
    assert "is a folder" in refused(tmp_path)


def test_a_bound_names_the_argument_that_broke_it_and_not_the_file(yaml_file: Path) -> None:
    yaml_file.write_text("train: {steps: 3}\n")
    assert refused(yaml_file, "train.steps=-3").startswith("argument 'train.steps=-3': train.steps=-3")


def test_no_episode_asks_more_often_than_it_is_let_act() -> None:
    talks = (
        "environment.name=conversation",
        "environment.conversation.path=talks.json",
        "environment.conversation.questions_per_episode=65",
    )
    assert "questions_per_episode=65 is not allowed: it must be at most rollout.max_turns=64; " in refused(
        None, *talks
    )
    load_config(None, [*talks, "rollout.max_turns=65"])
    load_config(
        None, [*talks, "environment.conversation.format=longmemeval"]
    )  # has one question a conversation, whatever is asked for
    load_config(None, talks[2:])  # of an environment that is not used
    search = (
        "environment.name=search",
        "environment.search.questions_path=q.json",
        "environment.search.corpus_path=c.json",
    )
    assert "environment.search.max_turns=65 is not allowed" in refused(
        None, *search, "environment.search.max_turns=65"
    )


def test_the_answers_temperature_is_that_of_sampling_unless_it_is_given(tmp_path: Path) -> None:
    plain = load_config(None, ["sampling.temperature=0.8"]).sampling
    assert (plain.answer_temperature, plain.of_answers) == (None, 0.8)
    greedy = load_config(None, ["sampling.answer_temperature=0"])
    assert greedy.sampling.of_answers == 0
    for config in (greedy, load_config(None, ["sampling.answer_temperature=null"])):
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "c.yaml", []) == config
    assert "answer_temperature=-1" in refused(None, "sampling.answer_temperature=-1")
    assert "it must be a number, or null" in refused(None, "sampling.answer_temperature=hot")
    nothing = ("sampling.answer_temperature=0", "objective.tokens=answers")
    assert "objective.tokens='answers' is not allowed: it must be both or cards" in refused(None, *nothing)


def test_bounds_hold_without_the_loader() -> None:
    with pytest.raises(ValueError, match="adam_beta2=1 is not allowed"):
        LearnerConfig(adam_beta2=1)
    with pytest.raises(ValueError, match=r"conversation\.path"):
        EnvironmentConfig(name="conversation")
