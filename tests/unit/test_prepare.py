"""What a training begins from: a new folder, the folder of a run that died early, or a checkpoint."""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest

from actors.protocols import TaskError
from actors.text.chat_template import open_chat
from cluster.common.errors import CheckpointError
from cluster.fleet.ledger import LedgerSnapshot
from cluster.runs.checkpoint import START, save_checkpoint
from cluster.runs.resume import note_run_id
from cluster.train.prepare import RunFolder, prepare_training
from configs.load import ConfigError, load_config, to_yaml
from configs.schema import RecordsConfig, RunConfig
from tests.unit.tokenizer_families import with_dated_template

STATE = replace(START, step=3, version=4, warm_steps=1, tracking_run_id="abc", ledger=LedgerSnapshot(6))


@pytest.fixture(scope="module")
def loaded(tiny_model_path: Path) -> RunConfig:
    settings = [f"model.name={tiny_model_path}", "fast_weights.basis=random", "evaluation.tasks=2"]
    return load_config(Path("tests/quickstart.yaml"), settings)


@pytest.fixture
def config(loaded: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(loaded, output_dir=str(tmp_path))


def save(folder: RunFolder, config: RunConfig) -> Path:
    async def write(target: Path) -> None:
        (target / "model").mkdir(parents=True)

    return asyncio.run(save_checkpoint(folder.path, STATE, to_yaml(config), write, 3)).folder


def test_a_new_run_begins_with_the_base_model_and_a_basis_of_its_own(config: RunConfig) -> None:
    spec, folder, start = prepare_training(config)
    assert folder.path.parent == Path(config.output_dir) and folder.basis.is_file()
    assert load_config(folder.config, []) == config
    assert (start.checkpoint, start.state, start.policy_path) == (None, START, spec.model_path)
    assert len(spec.eval_tasks) == 2


def test_a_window_that_an_extraction_does_not_fit_is_refused_with_the_least_that_is(
    config: RunConfig,
) -> None:
    """119 holds a full context and an extraction, but no memory-writing prompt: every write would fail."""
    with pytest.raises(
        ValueError, match=r"max_model_tokens=119 is not allowed: it must be \d+ or more"
    ) as no:
        prepare_training(_with_window(config, 119))
    least = int(str(no.value).split("must be ")[1].split()[0])
    assert "\n" not in str(no.value) and not list(Path(config.output_dir).iterdir())
    blind = replace(config, memory=replace(config.memory, question_blind=True))
    with pytest.raises(ValueError, match=rf"must be {least} or more"):
        prepare_training(_with_window(config, least - 1))
    prepare_training(_with_window(blind, least - 1))  # its prompt is shorter
    prepare_training(_with_window(config, least))


def _with_window(config: RunConfig, tokens: int) -> RunConfig:
    return replace(config, engine=replace(config.engine, max_model_tokens=tokens))


def test_a_run_that_died_before_its_first_checkpoint_goes_on_in_its_folder(config: RunConfig) -> None:
    _, folder, _ = prepare_training(config)
    note_run_id(folder.path, "abc")
    basis = folder.basis.read_bytes()
    spec, again, start = prepare_training(replace(config, resume="auto"))
    assert again.path == folder.path and folder.basis.read_bytes() == basis
    assert start.state == replace(START, tracking_run_id="abc")
    assert (start.checkpoint, start.policy_path) == (None, spec.model_path)


@pytest.mark.parametrize("resume", ["auto", "by name"])
def test_a_checkpoint_goes_on_with_its_weights_state_and_basis(config: RunConfig, resume: str) -> None:
    _, folder, _ = prepare_training(config)
    basis, saved = folder.basis.read_bytes(), save(folder, config)
    resumed = replace(config, resume="auto" if resume == "auto" else str(saved))
    spec, again, start = prepare_training(resumed)
    assert again.path == folder.path and folder.basis.read_bytes() == basis
    assert start.checkpoint is not None and start.checkpoint.folder == saved
    assert start.state == STATE and start.policy_path == saved / "learner" / "model" != spec.model_path


def test_a_setting_that_gives_the_checkpoint_its_meaning_may_not_change(config: RunConfig) -> None:
    _, folder, _ = prepare_training(config)
    saved = save(folder, config)
    with pytest.raises(CheckpointError, match=r"was made with seed=0, not 1"):
        prepare_training(replace(config, seed=1, resume=str(saved)))


@pytest.mark.parametrize("setting", ["tokens", "temperature"])
def test_a_memory_without_texts_needs_answers_to_train(config: RunConfig, setting: str) -> None:
    without = replace(config, memory=replace(config.memory, policy="truncation"))
    if setting == "tokens":
        without = replace(without, objective=replace(config.objective, tokens="cards"))
    else:
        without = replace(without, sampling=replace(config.sampling, answer_temperature=0.0))
    with pytest.raises(
        ConfigError, match=r"^memory\.policy=truncation writes no text.*nothing is left to train"
    ):
        prepare_training(without)
    prepare_training(replace(without, train=replace(config.train, steps=0)))


def test_credit_by_question_needs_an_environment_that_says_what_a_card_served(
    config: RunConfig, tmp_path: Path
) -> None:
    by_question = replace(config, objective=replace(config.objective, credit="question"))
    prepare_training(by_question)
    lines = (f'{{"texts": "{text}", "question": "q", "answer": "b"}}' for text in "ab")
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    records = replace(
        config.environment, name="records", records=RecordsConfig(path=str(tmp_path / "notes.jsonl"))
    )
    steps = replace(config.warm_start, steps=0)
    with pytest.raises(
        TaskError, match=r"^objective\.credit=question is not possible: the environment records"
    ):
        prepare_training(replace(by_question, environment=records, warm_start=steps))


@pytest.mark.parametrize("control", ["oracle", "other_cards", "oracle_other_cards"])
def test_a_training_with_a_control_is_refused(config: RunConfig, control: str) -> None:
    controlled = replace(config, memory=replace(config.memory, control=control))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^memory\.control={control} is for evaluation .*engram evaluate"):
        prepare_training(controlled)
    assert not list(Path(config.output_dir).iterdir())


# --- the day in a chat template ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dated_model(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_dated_template(tiny_model_path, tmp_path_factory.mktemp("dated") / "model")


@pytest.mark.parametrize("resume", ["auto before a checkpoint", "auto", "by name"])
def test_the_day_in_a_template_is_pinned_at_the_start_and_kept(
    config: RunConfig, dated_model: Path, resume: str
) -> None:
    model = replace(config.model, name=str(dated_model))
    spec, folder, _ = prepare_training(replace(config, model=model))
    today = dt.date.today().isoformat()
    assert spec.config.model.date == today == load_config(folder.config, []).model.date
    yesterday = to_yaml(spec.config).replace(today, "2026-01-02")
    folder.config.write_text(yesterday)
    if resume != "auto before a checkpoint":
        saved = save(folder, load_config(folder.config, []))
    name = str(saved) if resume == "by name" else "auto"
    again, same, start = prepare_training(replace(config, model=model, resume=name))
    assert same.path == folder.path and (start.checkpoint is not None) == (
        resume != "auto before a checkpoint"
    )
    assert again.config.model.date == "2026-01-02" == load_config(folder.config, []).model.date
    system = open_chat(again.model_path, again.config.model).system("Be brief.")
    assert "Today is 2026-01-02.\n\nBe brief." in open_chat(again.model_path, again.config.model).decode(
        system
    )


def test_a_day_of_ones_own_is_kept_and_no_template_without_one_gets_it(
    config: RunConfig, dated_model: Path
) -> None:
    assert prepare_training(config)[0].config.model.date == ""
    own = replace(config.model, name=str(dated_model), date="2025-12-24")
    spec, folder, _ = prepare_training(replace(config, name="own", model=own))
    assert spec.config.model.date == "2025-12-24"
    saved = save(folder, spec.config)
    other = replace(own, date="2025-12-25")
    with pytest.raises(CheckpointError, match=r"model.date=2025-12-24, not 2025-12-25"):
        prepare_training(replace(config, name="own", model=other, resume=str(saved)))


@pytest.mark.parametrize("day", ["tomorrow", "2026-13-01", "20260101", "2026-1-1"])
def test_a_day_is_a_day(day: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.date='.*' is not allowed: it must be a day such as"):
        load_config(None, [f"model.date={day}"])
