"""Exports what was trained to other tools: a memory as a PEFT adapter, a checkpoint as a Hugging Face folder.

    a checkpoint, or a run (its newest)          -> DIR: config.json, model.safetensors, the tokenizer,
                                                    a model card; DIR/engram: basis, settings and state
      where theta is a LoRA (trainable=lora)     -> DIR: adapter_config.json, adapter_model.safetensors, for
                                                    the base model; with --merge the whole model, as above
    a saved conversation (a folder)              -> DIR: the adapter alone, without flashcards and context
    an episode's record (.json in RUN/episodes)  -> DIR: adapter_config.json, adapter_model.safetensors,
                                                    made by replaying the write log on the same base

Each folder appears whole or not at all. ``chat`` and ``serve`` read all but the LoRA of theta, which is no
memory: they take its run, or the merged model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from actors.protocols import WriterError
from actors.types import WriteRecord
from cluster.assistant.memory_file import MEMORY_FILE, SavedMemory, save_memory
from cluster.assistant.opening import (
    BASIS_FILE,
    CONFIG_FILE,
    AssistantError,
    Opening,
    Source,
    find_checkpoint_of,
    is_hub_name,
    open_source,
)
from cluster.common.errors import CheckpointError
from cluster.inspection.record import EpisodeRecord, FailureRecord, load
from cluster.measure.report import Document, Section, Table, markdown
from cluster.measure.rows import RowResult, load_row
from cluster.measure.scores import F1, REWARD, label, score_text, unit
from cluster.runs.checkpoint import (
    COMPANION,
    STATE_FILE,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    score_of,
)
from configs.files import dump_json, new_folder
from configs.load import flatten, load_config
from configs.mixture import members
from configs.models import resolve_model
from configs.schema import ModelConfig
from configs.tolerances import receipt_tolerance

CARD_FILE = "README.md"
_WRITING = ("memory.policy", "memory.max_context_tokens", "memory.max_extract_tokens", "model.dtype")
_SECTIONS = ("write.", "fast_weights.")
_SCORES = (F1, "em", REWARD)
_USE = """In conversation it writes what it hears into fast weights, with the settings below:

```sh
engram chat {name}
engram serve {name} --port 8123
engram evaluate {name}/engram/config.yaml checkpoint={name}
```

Without Engram it is an ordinary model, which answers from its context alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`engram export` also makes a PEFT adapter of a conversation's memory. Stock PEFT and vLLM load it."""


def export(source: Path, target: Path, model: str, merge: bool = False, allow_code: bool = False) -> str:
    """Write ``target``, which must be new or empty; returns a description of what it holds.

    ``model`` names the weights that an episode was played on; "" finds them in its run. With ``merge`` a
    checkpoint is always a whole model, even where theta is a LoRA.
    Raises AssistantError, RecordError, CheckpointError, ModelError, BasisError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AssistantError(f"{target}: already holds something; export into a new folder")
    if merge and source.is_file():
        raise AssistantError(f"--merge: {source} is an episode's record; only a checkpoint has two forms")
    if model and not source.is_file():
        raise AssistantError(f"--model {model}: only an episode's record needs it; {source} is a folder")
    if source.is_file():
        return _export_episode(source, target, model, allow_code)
    if (source / MEMORY_FILE).exists():
        return _export_conversation(source, target)
    if source.is_dir() and (checkpoint := find_checkpoint_of(source)) is not None:
        adapter = checkpoint.learner / "adapter"
        if adapter.exists() and not merge:
            return _export_adapter(checkpoint, adapter, target)
        return _export_checkpoint(checkpoint, target)
    raise AssistantError(
        f"{source}: is no run, checkpoint, saved conversation or episode's record; "
        "engram inspect RUN lists episodes"
    )


def _export_checkpoint(checkpoint: Checkpoint, target: Path) -> str:
    from actors.fast_weights.basis import load_basis

    # Refuse a checkpoint that other tools could not load, and a damaged basis, before anything is written.
    resolve_model(ModelConfig(name=str(checkpoint.model)))
    basis = checkpoint.run_dir / BASIS_FILE
    load_basis(basis)

    with _folder_at(target) as folder:
        shutil.copytree(checkpoint.model, folder, dirs_exist_ok=True)
        (folder / COMPANION).mkdir()
        shutil.copyfile(basis, folder / COMPANION / BASIS_FILE)
        for name in (CONFIG_FILE, STATE_FILE):
            shutil.copyfile(checkpoint.folder / name, folder / COMPANION / name)
        (folder / CARD_FILE).write_text(model_card(checkpoint, target.name), encoding="utf-8")
    return f"a Hugging Face model: {_theta(checkpoint)}"


def _export_adapter(checkpoint: Checkpoint, adapter: Path, target: Path) -> str:
    """Copy the LoRA. Its base is the name that the run used where that is a hub's, else the folder."""
    base = load_config(checkpoint.folder / CONFIG_FILE, ()).model.name
    with _folder_at(target) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        if is_hub_name(base):
            path = folder / "adapter_config.json"
            settings = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
            path.write_text(dump_json(settings), encoding="utf-8")
    return f"a PEFT adapter of {base}: {_theta(checkpoint)}; --merge writes the whole model"


def _theta(checkpoint: Checkpoint) -> str:
    state = checkpoint.state
    return f"theta after {state.step} RL steps (version {state.version}) of {checkpoint.run_dir.name}"


def _export_conversation(source: Path, target: Path) -> str:
    with _folder_at(target) as folder:
        for path in source.iterdir():
            if path.name != MEMORY_FILE and path.is_file():
                shutil.copyfile(path, folder / path.name)
    return "a PEFT adapter: the memory of a conversation"


def _export_episode(path: Path, target: Path, model: str, allow_code: bool) -> str:
    record = load(path)
    if isinstance(record, FailureRecord):
        raise AssistantError(f"{path}: the episode failed ({record.boundary}), so it left no memory")
    log = [write.log for write in record.writes]
    accepted = sum(write.outcome == "accepted" for write in log)
    if accepted == 0:
        raise AssistantError(
            f"{path}: none of the episode's {len(log)} writes was accepted, so it left no memory"
        )
    opening = open_source(str(path), _source_of(path, record, model), None, (), allow_code)
    if opening.basis.id != record.basis_id:
        raise AssistantError(
            f"{path}: was played on the basis {record.basis_id}, "
            f"{opening.model.path} has {opening.basis.id}; give --model"
        )
    memory = _replay(path, record, log, opening)
    save_memory(memory, replace(opening, title=opening.config.model.name), target, overwrite=True)
    return (
        f"a PEFT adapter for {opening.model.path}: "
        f"the memory of episode {record.episode_id} after {accepted} writes"
    )


def _source_of(path: Path, record: EpisodeRecord, model: str) -> Source:
    """The weights of the episode's policy version, ``model`` if it is given."""
    run_dir, config_path = path.absolute().parent.parent, path.parent / record.origin.config
    basis = run_dir / BASIS_FILE
    name = model or _model_of_version(path, run_dir, config_path, record.policy_version)
    return Source(name, config_path, basis if basis.exists() else None)


def _model_of_version(path: Path, run_dir: Path, config_path: Path, version: int) -> str:
    checkpoints = map(load_checkpoint, list_checkpoints(run_dir))
    models = {checkpoint.state.version: str(checkpoint.model) for checkpoint in checkpoints}
    if version in models:
        return models[version]
    if version == 0:
        return load_config(config_path, ()).model.name
    have = f"checkpoints of versions {', '.join(map(str, sorted(models)))}" if models else "no checkpoint"
    raise AssistantError(
        f"{path}: was played on policy version {version} and {run_dir} has {have}; give --model FOLDER"
    )


def _replay(path: Path, record: EpisodeRecord, log: list[WriteRecord], opening: Opening) -> SavedMemory:
    import torch

    from actors.episodes.recovery import replay
    from actors.write.writer import checkpoint_writer

    config, basis = opening.config, opening.basis
    device = torch.device("cpu")
    writer = checkpoint_writer(str(opening.model.path), basis, config.write, config.model.dtype, device)
    try:
        revisions = replay(
            writer, record.episode_id, basis.id, log, receipt_tolerance(config.engine, config.model)
        )
    except WriterError as error:
        raise AssistantError(f"{path}: {error}") from error
    without_examples = tuple(replace(write, examples=()) for write in log)
    return SavedMemory(revisions[-1], opening.system_prompt, (), without_examples, None)


@contextmanager
def _folder_at(target: Path) -> Iterator[Path]:
    try:
        with new_folder(target) as folder:
            yield folder
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise AssistantError(f"{target}: cannot be written ({reason})") from error


def model_card(checkpoint: Checkpoint, name: str) -> str:
    """Describe ``checkpoint``, whose export is called ``name``. Raises CheckpointError."""
    config = load_config(checkpoint.folder / "config.yaml", [])
    state = checkpoint.state
    facts = {
        "base model": config.model.name,
        "run": checkpoint.run_dir.name,
        "training": f"{state.warm_steps} supervised steps, {state.step} RL steps (version {state.version})",
        "environment": " + ".join(each.name for each in members(config.environment))
        or config.environment.name,
    }
    if (score := score_of(checkpoint.folder)) is not None:
        facts["held-out score during training"] = f"{label(score[0])} {score[1]:.3f}"
    settings = {
        key: value for key, value in flatten(config).items() if key in _WRITING or key.startswith(_SECTIONS)
    }
    sections = (
        Section("Use", _USE.format(name=name)),
        Section("Held-out evaluation of the run", tables=_scores(checkpoint)),
        Section("Settings of the write", tables=(Table("", ("setting", "value"), tuple(settings.items())),)),
    )
    return _front_matter(config.model.name) + markdown(Document(name, facts, sections))


def _front_matter(base: str) -> str:
    """What model hubs read. A base that lies in a folder has no name there."""
    named = f"base_model: {base}\n" if base.count("/") == 1 and not Path(base).expanduser().exists() else ""
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{named}tags: [engram]\n---\n\n"


def _scores(checkpoint: Checkpoint) -> tuple[Table, ...]:
    """The run's rows up to the checkpoint's version; () where none was kept."""
    rows = [row for path in _measured(checkpoint) if (row := _row(path)) is not None]
    rows = [row for row in rows if row.policy_version <= checkpoint.state.version]
    if not rows:
        return ()
    scores = [score for score in _SCORES if any(score in row.score_names for row in rows)]
    lines = [
        (
            row.label,
            str(row.policy_version),
            str(len(row.episodes)),
            str(len(row.failed)),
            *(score_text(score, row.interval(score)) for score in scores),
        )
        for row in rows
    ]
    titles = (f"{label(score)}{unit(score)} [95% CI]" for score in scores)
    return (Table("", ("row", "version", "tasks", "failed", *titles), tuple(lines)),)


def _measured(checkpoint: Checkpoint) -> list[Path]:
    """The files of the rows, in the order in which they were measured."""
    return sorted(
        (checkpoint.run_dir / "evaluation").glob("*.json"), key=lambda path: (path.stat().st_mtime, path)
    )


def _row(path: Path) -> RowResult | None:
    try:
        return load_row(path)
    except CheckpointError:  # a damaged row is no reason to have no export
        return None
