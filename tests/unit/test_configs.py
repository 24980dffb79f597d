"""The configuration: shipped files load, what is written loads back, a mistake is one helpful line."""

from __future__ import annotations

import inspect
import io
import time
import tokenize
from dataclasses import FrozenInstanceError, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import environments, learning, memory, schema, yaml_scalars
from configs.load import ConfigError, flatten, load_config, to_yaml
from configs.reference import settings as all_settings
from configs.reference import settings_help
from configs.schema import RecordsConfig, RunConfig, TrackingConfig
from configs.shipped import find_config, shipped

SHIPPED = list(shipped().values())


def refused(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


# --- what loads ---------------------------------------------------------------------------------------------


def test_the_shipped_files_are_the_expected_ones() -> None:
    assert {file.stem for file in SHIPPED} >= {"quickstart", "one_gpu", "node_8gpu", "paper", "locomo"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_file_loads_and_round_trips(file: Path, yaml_file: Path) -> None:
    talks, rubrics = ["environment.conversation.path=locomo.json"], ["environment.rubric.path=items.jsonl"]
    search = [
        "environment.search.questions_path=questions.json",
        "environment.search.corpus_path=corpus.json",
    ]
    needs_data = {"locomo": talks, "longmemeval": talks, "paper": talks, "rubric": rubrics, "search": search}
    config = load_config(file, needs_data.get(file.stem, []))
    yaml_file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(yaml_file, []) == config
    assert config.name == file.stem


def test_the_paper_preset_is_the_papers() -> None:
    paper = load_config(shipped()["paper"], ["environment.conversation.path=locomo.json"])
    train, write, fast = paper.train, paper.write, paper.fast_weights
    assert (train.steps, train.tasks_per_step, train.group_size) == (200, 64, 8)
    assert (paper.learner.learning_rate, paper.learner.trainable) == (1e-6, "full")
    assert (write.optimizer, write.learning_rate, write.epochs, write.batch_size) == ("sgd", 5e-4, 5, 16)
    assert (fast.rank, fast.last_layers, fast.basis) == (6, 4, "svd")
    assert (paper.memory.max_context_tokens, paper.sampling.max_answer_tokens) == (4096, 1024)


def test_no_file_and_no_override_is_the_schema() -> None:
    assert load_config(None, []) == RunConfig()


def test_overrides_win_over_the_file_and_later_over_earlier(yaml_file: Path) -> None:
    yaml_file.write_text("train:\n  steps: 3\n  group_size: 5\n")
    overrides = ["train.steps=4", "train.steps=6", "fast_weights.projections=[up_proj]"]
    config = load_config(yaml_file, [*overrides, "learner.learning_rate=1e-4"])
    assert (config.train.steps, config.train.group_size) == (6, 5)
    assert config.fast_weights.projections == ("up_proj",)
    assert config.learner.learning_rate == 1e-4


def test_text_is_taken_as_typed_and_references_resolve() -> None:
    config = load_config(
        None,
        [
            "environment.conversation.path=a b=c #1.json",
            "tracking.experiment=",
            "train.steps=${train.group_size}",
        ],
    )
    assert config.environment.conversation.path == "a b=c #1.json"
    assert config.tracking.experiment == ""
    assert config.train.steps == config.train.group_size


def test_references_see_final_values_of_the_right_type() -> None:
    later = ["train.steps=${train.group_size}", "name=run-${train.steps}", "train.group_size='5'"]
    config = load_config(None, [*later, "environment.options={tag: ['${name}']}"])
    assert (config.train.steps, config.name) == (5, "run-5")
    assert config.environment.options == {"tag": ["run-5"]}
    assert load_config(None, ["train.steps=${nope}", "train.steps=3"]).train.steps == 3  # never looked up


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ("name: 3", "name", "3"),
        ("model: {name: off}", "model.name", "off"),
        ("name: on", "name", "on"),
        ("name: 1e3", "name", "1e3"),
        ("name: 0123", "name", "0123"),
        ("name: 1_000", "name", "1_000"),
        ("name: true", "name", "true"),
        ("name: 12:30:45", "name", "12:30:45"),
        ("name: 2026-11-30", "name", "2026-11-30"),
        ("name: 0x1F", "name", "0x1F"),
        ("tracking: {experiment: .5}", "tracking.experiment", ".5"),
        ("tracking: {models: off}", "tracking.models", "off"),
        ("tracking: {enabled: off}", "tracking.enabled", False),
        ("train: {steps: 0x1F}", "train.steps", 31),
        ("train: {steps: 0o17}", "train.steps", 15),
        ("learner: {learning_rate: 1e-3}", "learner.learning_rate", 1e-3),
        ("learner: {learning_rate: 5.}", "learner.learning_rate", 5.0),
        (
            "environment: {options: {a: 010, b: [on, 1e3, 7, true, ~]}}",
            "environment.options",
            {"a": "010", "b": ["on", 1000.0, 7, True, None]},
        ),
        ("rollout: {schedule: [10:4, '50:2']}", "rollout.schedule", ("10:4", "50:2")),
        ("environment: {options: &shared {steps: 7}}\ntrain: {<<: *shared}", "train.steps", 7),
        ("train: {steps: '3'}", "train.steps", 3),
        ("engine: {enforce_eager: 'yes'}", "engine.enforce_eager", True),
        ("learner: {learning_rate: 1}", "learner.learning_rate", 1.0),
        ("learner: {learning_rate: '1e-3'}", "learner.learning_rate", 1e-3),
        (
            "environment: {conversation: {categories: [1, '2']}}",
            "environment.conversation.categories",
            (1, 2),
        ),
    ],
)
def test_a_value_takes_its_settings_type(yaml_file: Path, content: str, key: str, expected: object) -> None:
    yaml_file.write_text(content)
    value: object = load_config(yaml_file, [])
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("content", "argument"),
    [
        ("train: {steps: 0010}", "train.steps=0010"),
        ("train: {steps: '010'}", "train.steps='010'"),
        ("train: {steps: -01}", "train.steps=-01"),
        ("learner: {learning_rate: 01e-3}", "learner.learning_rate=01e-3"),
        ("write: {depths: [1, 010]}", "write.depths=[1,010]"),
    ],
)
def test_a_number_with_a_leading_zero_is_refused(yaml_file: Path, content: str, argument: str) -> None:
    """YAML 1.1 reads 0010 as 8, YAML 1.2 as 10."""
    yaml_file.write_text(content)
    assert "without the leading zero" in refused(yaml_file) and "without the leading zero" in refused(
        None, argument
    )


def test_a_time_of_day_is_no_number(yaml_file: Path) -> None:
    """YAML 1.1 reads 1:30 as 90."""
    yaml_file.write_text("assistant: {idle_s: 1:30}")
    assert "assistant.idle_s='1:30' is not allowed: it must be a number" in refused(yaml_file)


def test_arguments_are_read_as_files_are() -> None:
    arguments = ["environment.options.a=010", "environment.options.b=on", "environment.options.c=[1e3]"]
    config = load_config(None, [*arguments, "train.steps=0", "tracking.enabled=false"])
    assert config.environment.options == {"a": "010", "b": "on", "c": [1000.0]}
    assert (config.train.steps, config.tracking.enabled) == (0, False)


def test_a_list_of_texts_may_quote_its_items() -> None:
    def command(text: str) -> tuple[str, ...]:
        return load_config(None, [f"environment.harness.command={text}"]).environment.harness.command

    assert command('[python, -c, "print(1, 2)"]') == ("python", "-c", "print(1, 2)")
    assert command("['python', 'a, b.py']") == ("python", "a, b.py")
    assert command('[python, it\'s, a.py, say "hi"]') == ("python", "it's", "a.py", 'say "hi"')


PATHS = (
    "output_dir",
    "store.work_dir",
    "resume",
    "model.name",
    "embedder.name",
    "environment.conversation.path",
    "environment.search.questions_path",
    "environment.search.corpus_path",
    "environment.rubric.path",
    "environment.rubric.judge.cache_dir",
    "environment.records.path",
    "environment.mcp.path",
    "fast_weights.calibration_path",
    "warm_start.demonstrations",
    "warm_start.teacher.cache_dir",
    "assistant.save_dir",
    "tracking.uri",
)


def test_the_home_folder_stands_for_a_tilde_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/nora")
    config = load_config(None, [f"{path}=~/a b" for path in PATHS])
    flat = flatten(config)
    assert {flat[path] for path in PATHS} == {"/home/nora/a b"}
    unnamed = {key for key in all_settings() if key.endswith(("path", "_dir"))} - set(PATHS)
    assert unnamed == set(), "a new path setting: expand its ~"
    assert RecordsConfig(path="a~/b").path == "a~/b"


def test_a_load_takes_milliseconds() -> None:
    """A thousand tests load one. Whole OmegaConf merges took 170 ms of CPU, this takes 12."""
    overrides = ["train.steps=3", "write.epochs=2"]
    load_config(shipped()["quickstart"], overrides)
    start = time.process_time()
    for _ in range(5):
        load_config(shipped()["quickstart"], overrides)
    assert (time.process_time() - start) / 5 < 0.06


def test_an_empty_section_changes_nothing(yaml_file: Path) -> None:
    yaml_file.write_text("train:\n  # steps: 3\n")
    assert load_config(yaml_file, []) == RunConfig()


def test_a_mapping_that_was_merged_may_be_merged_again() -> None:
    text = "b: &b {k: 0}\nx: {y: &a {<<: *b, k: 1}}\nz: {<<: *a}"
    assert yaml_scalars.values(yaml_scalars.parse(text))["z"] == {"k": 1}


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc"))).filter(lambda text: text != "???"))
def test_any_text_round_trips(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("round") / "x.yaml"
    config = RunConfig(tracking=TrackingConfig(experiment=text), output_dir=f"\\${{{text}}}")
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file, []) == config


def test_the_configuration_is_frozen_all_the_way() -> None:
    with pytest.raises(FrozenInstanceError):
        load_config(None, ["train.steps=3"]).train.steps = 4  # type: ignore[misc]


# --- shipped files by name ----------------------------------------------------------------------------------


def test_a_config_is_a_shipped_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "paper").write_text("name: of the user\n")
    assert find_config("quickstart") == shipped()["quickstart"]
    assert find_config("mine.yaml") == Path("mine.yaml")
    assert find_config("paper") == shipped()["paper"] and find_config("./paper") == Path("paper")
    with pytest.raises(ConfigError, match=r"^quickstrat: no such file; did you mean quickstart; shipped"):
        find_config("quickstrat")
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        find_config("tests/quickstart.yaml")  # in a folder that is no checkout
    assert set(shipped("rows")) > {"tmem", "truncation"} and "write" in shipped("studies")


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 200])
def test_help_has_every_setting_with_its_default_and_allowed_values(width: int) -> None:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(settings_help())
    text = captured.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert len(all_settings()) > 80
    for setting in all_settings().values():
        assert f" {setting.key} " in text and setting.allowed
        assert setting.allowed.split()[-1] in text
    assert "one of recall, conversation" in text
    assert "nats per token" in text  # a field's comment
    assert "dropped and counted" in text  # a section's docstring


def test_a_schedule_is_taken_as_typed(tmp_path: Path) -> None:
    """YAML 1.1 reads 10:4 as 604, in base 60."""
    assert load_config(None, ["rollout.schedule=[10:4,50:2]"]).rollout.schedule == ("10:4", "50:2")
    assert load_config(None, ["rollout.schedule=['10:4', \"50:2\"]"]).rollout.schedule == ("10:4", "50:2")
    assert load_config(None, ["rollout.schedule=[]"]).rollout.schedule == ()
    file = tmp_path / "run.yaml"
    file.write_text('rollout: {schedule: ["10:4"]}', encoding="utf-8")
    assert load_config(file, []).rollout.schedule == ("10:4",)
    file.write_text("rollout: {schedule: [10:4]}", encoding="utf-8")
    assert load_config(file, []).rollout.schedule == ("10:4",)


def test_every_comment_of_a_field_is_its_help() -> None:
    """A comment that the formatter has moved into a bracket would vanish from --help."""
    helps = " ".join(setting.help for setting in all_settings().values())
    comments = [
        token.string.removeprefix("# ")
        for module in (environments, learning, memory, schema)
        for cls in vars(module).values()
        if is_dataclass(cls) and isinstance(cls, type) and cls.__module__ == module.__name__
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline)
        if token.type == tokenize.COMMENT and token.line.startswith("    ") and token.line[4] != " "
    ]
    assert len(comments) > 100
    assert [comment for comment in comments if comment not in helps] == []


def test_defaults_have_the_type_of_their_field() -> None:
    """An int in a float field is saved as 600, and as 600.0 after it was loaded: one run, two texts."""
    plain = [setting for setting in all_settings().values() if setting.kind in (int, float, str, bool)]
    assert [setting.key for setting in plain if type(setting.default) is not setting.kind] == []
