"""What was trained, for other tools: an episode's or a conversation's memory as a PEFT adapter, a checkpoint as a Hugging Face folder.

    an episode's record (.json in RUN/episodes)    its log of writes replayed on the same base -> DIR: adapter_config.json, adapter_model.safetensors
    a saved conversation (a folder)                the adapter alone, without flashcards and context
    a checkpoint, or a run (its newest)            DIR: config.json, model.safetensors, the tokenizer; DIR/engram: the run's basis and settings

Each folder appears whole or not at all. ``chat`` and ``serve`` read all three.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from actors.fast_weights.basis import load_basis
from actors.protocols import WriterError
from actors.types import WriteRecord
from cluster.assistant.memory_file import MEMORY_FILE, save_memory
from cluster.assistant.opening import BASIS_FILE, CONFIG_FILE, Source, find_checkpoint_of, open_source
from cluster.assistant.values import COMPANION, AssistantError, Opening, SavedMemory
from cluster.inspection.record import EpisodeRecord, FailureRecord, load
from cluster.runs.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from configs.load import load_config
from configs.models import resolve_model
from configs.schema import ModelConfig


def export(source: Path, target: Path, model: str) -> str:
    """Write ``target``, which must be new or empty; returns what it is now. ``model``: the weights that an episode was played on, "" to find them.

    Raises AssistantError, RecordError, CheckpointError, ModelError, BasisError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AssistantError(f"{target}: already holds something; export into a new folder")
    if model and not source.is_file():
        raise AssistantError(f"--model {model}: only an episode's record needs it; {source} is a folder")
    if source.is_file():
        return _episode(source, target, model)
    if (source / MEMORY_FILE).exists():
        return _conversation(source, target)
    if source.is_dir() and (checkpoint := find_checkpoint_of(source)) is not None:
        return _checkpoint(checkpoint, target)
    raise AssistantError(
        f"{source}: is no run, checkpoint, saved conversation or episode's record; python -m cluster inspect RUN lists episodes"
    )


def _checkpoint(checkpoint: Checkpoint, target: Path) -> str:
    resolve_model(
        ModelConfig(name=str(checkpoint.model))
    )  # whole, with a tokenizer, and of a kind that others load
    basis = checkpoint.run_dir / BASIS_FILE
    load_basis(basis)

    def fill(folder: Path) -> None:
        shutil.copytree(checkpoint.model, folder, dirs_exist_ok=True)
        (folder / COMPANION).mkdir()
        shutil.copyfile(basis, folder / COMPANION / BASIS_FILE)
        shutil.copyfile(checkpoint.folder / CONFIG_FILE, folder / COMPANION / CONFIG_FILE)

    _appear(target, fill)
    return f"a Hugging Face model: theta after {checkpoint.state.step} RL steps (version {checkpoint.state.version}) of {checkpoint.run_dir.name}"


def _conversation(source: Path, target: Path) -> str:
    def fill(folder: Path) -> None:
        for path in source.iterdir():
            if path.name != MEMORY_FILE and path.is_file():
                shutil.copyfile(path, folder / path.name)

    _appear(target, fill)
    return "a PEFT adapter: the memory of a conversation"


def _appear(target: Path, fill: Callable[[Path], None]) -> None:
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(target)  # onto nothing, or onto an empty folder
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AssistantError(f"{target}: cannot be written ({' '.join(str(error).split())[:200]})") from error


def _episode(path: Path, target: Path, model: str) -> str:
    record = load(path)
    if isinstance(record, FailureRecord):
        raise AssistantError(f"{path}: the episode failed ({record.boundary}), so it left no memory")
    log = [write.log for write in record.writes]
    accepted = sum(write.outcome == "accepted" for write in log)
    if accepted == 0:
        raise AssistantError(
            f"{path}: none of the episode's {len(log)} writes was accepted, so it left no memory"
        )
    opening = open_source(str(path), _theta(path, record, model), None, ())
    if opening.basis.id != record.basis_id:
        raise AssistantError(
            f"{path}: was played on the basis {record.basis_id}, {opening.model.path} has {opening.basis.id}; give --model"
        )
    save_memory(
        _replayed(path, record, log, opening),
        replace(opening, title=opening.config.model.name),
        target,
        overwrite=True,
    )
    return f"a PEFT adapter for {opening.model.path}: the memory of episode {record.episode_id} after {accepted} writes"


def _theta(path: Path, record: EpisodeRecord, model: str) -> Source:
    """The weights of the episode's policy version: the run's checkpoint of it, or for version 0 what the run began with."""
    run_dir, config_path = path.absolute().parent.parent, path.parent / record.origin.config
    name, basis = model, run_dir / BASIS_FILE
    if not name:
        kept = {one.state.version: one for one in map(load_checkpoint, list_checkpoints(run_dir))}
        if (checkpoint := kept.get(record.policy_version)) is not None:
            name = str(checkpoint.model)
        elif record.policy_version == 0:
            name = load_config(config_path, ()).model.name
        else:
            have = f"checkpoints of versions {', '.join(map(str, sorted(kept)))}" if kept else "no checkpoint"
            raise AssistantError(
                f"{path}: was played on policy version {record.policy_version} and {run_dir} has {have}; give --model FOLDER"
            )
    return Source(name, config_path, basis if basis.exists() else None)


def _replayed(path: Path, record: EpisodeRecord, log: list[WriteRecord], opening: Opening) -> SavedMemory:
    import torch

    from actors.episodes.recovery import replay
    from actors.write.writer import checkpoint_writer

    config = opening.config
    writer = checkpoint_writer(
        str(opening.model.path), opening.basis, config.write, config.model.dtype, torch.device("cpu")
    )
    try:
        revisions = replay(writer, record.episode_id, opening.basis.id, log, config.engine.receipt_tolerance)
    except WriterError as error:
        raise AssistantError(f"{path}: {error}") from error
    slim = tuple(replace(write, examples=()) for write in log)
    return SavedMemory(revisions[-1], opening.system_prompt, (), slim, None)
