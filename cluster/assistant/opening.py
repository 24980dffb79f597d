"""From what the user names to a model that converses: everything that a mistake can break first, the engine last.

smollm2-135m | folder | hub name            configs/chat.yaml (or --config), the basis computed from the weights
a run's folder | one of its checkpoints     its own config.yaml and basis
a folder that ``export`` wrote              those that export put into it
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import configs
from actors.fast_weights.basis import compute_basis_from_checkpoint, load_basis
from actors.fast_weights.delta import Basis
from cluster.assistant.values import COMPANION, AssistantError, Opening, Parts
from cluster.runs.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from configs.load import load_config
from configs.models import resolve_model
from configs.schema import RunConfig

BASIS_FILE, CONFIG_FILE = (
    "basis.safetensors",
    "config.yaml",
)  # in the folder of a run, and in that of an exported model
PRESET = Path(configs.__file__).parent / "chat.yaml"


@dataclass(frozen=True, slots=True)
class Source:
    """Where settings and weights come from. ``basis_path`` is None where the basis is to be computed."""

    model: str
    config_path: Path
    basis_path: Path | None


def find_checkpoint_of(folder: Path) -> Checkpoint | None:
    """The checkpoint that ``folder`` is, or the newest of the run that it is; None where it is neither. Raises CheckpointError for a damaged one."""
    if (folder / "state.json").exists():
        return load_checkpoint(folder)
    inside = list_checkpoints(folder)
    return load_checkpoint(inside[-1]) if inside else None


def locate(model: str) -> Source:
    """Raises CheckpointError."""
    folder = Path(model).expanduser().absolute()
    if folder.is_dir():
        if (checkpoint := find_checkpoint_of(folder)) is not None:
            return Source(
                str(checkpoint.model), checkpoint.folder / CONFIG_FILE, checkpoint.run_dir / BASIS_FILE
            )
        if (folder / COMPANION / BASIS_FILE).exists():
            return Source(str(folder), folder / COMPANION / CONFIG_FILE, folder / COMPANION / BASIS_FILE)
    return Source(model, PRESET, None)


def prepare_opening(model: str, config_path: Path | None, overrides: Sequence[str]) -> Opening:
    """Raises ConfigError, ModelError, CheckpointError, BasisError, AssistantError: one line each. No engine is started."""
    return open_source(model, locate(model), config_path, overrides)


def open_source(title: str, source: Source, config_path: Path | None, overrides: Sequence[str]) -> Opening:
    """``config_path`` takes the place of the source's own settings. Raises as ``prepare_opening``."""
    config = load_config(config_path or source.config_path, [*overrides, f"model.name={source.model}"])
    _check(config, source, overrides)
    resolved = resolve_model(config.model)
    return Opening(
        title,
        config,
        resolved,
        _basis(source, resolved.path, config),
        config.assistant.system_prompt or _environments_prompt(config),
    )


@contextmanager
def parts_of(opening: Opening, slots: int) -> Iterator[Parts]:
    """A running engine with its writer, for ``slots`` conversations that speak at once. Raises EngineError, ChatTemplateError."""
    import torch
    from transformers import AutoTokenizer

    from actors.engine.policy import VLLMPolicy
    from actors.episodes.rollout import WriteBatcher
    from actors.text.chat_template import ChatFormat

    config, path = opening.config, opening.model.path
    os.environ.setdefault(
        "VLLM_LOGGING_LEVEL", "ERROR"
    )  # a dozen warnings about the machine would stand between a person and the agent
    torch.set_num_threads(config.rollout.threads)
    chat = ChatFormat(AutoTokenizer.from_pretrained(path))
    engine = replace(config.engine, slots=slots)
    policy = VLLMPolicy(
        path, config.model, engine, opening.basis, chat.stop_token_ids, 0, config.rollout.threads, config.seed
    )
    try:
        yield Parts(opening, policy, WriteBatcher(policy.writer(config.write)), chat, lambda: policy.failure)
    finally:
        policy.close()


def _basis(source: Source, path: Path, config: RunConfig) -> Basis:
    return (
        compute_basis_from_checkpoint(path, config.fast_weights, config.seed)
        if source.basis_path is None
        else load_basis(source.basis_path)
    )


def _check(config: RunConfig, source: Source, overrides: Sequence[str]) -> None:
    named = next((argument for argument in overrides if argument.startswith("model.name=")), None)
    if named is not None:
        raise AssistantError(
            f"argument {named!r}: name the model without it, e.g. chat {named.partition('=')[2]}"
        )
    moved = next((argument for argument in overrides if argument.startswith("fast_weights.")), None)
    if moved is not None and source.basis_path is not None:
        raise AssistantError(
            f"argument {moved!r}: {source.model} has its own basis, which cannot be changed; leave it out"
        )
    if config.memory.policy != "parametric":
        raise AssistantError(
            f"memory.policy={config.memory.policy} keeps nothing in weights: a conversation needs memory.policy=parametric"
        )
    if config.write.epochs == 0:
        raise AssistantError("write.epochs=0 writes nothing: a conversation needs 1 or more")


def _environments_prompt(config: RunConfig) -> str:
    """What the agents of this configuration are told. Of an environment that is not Engram's own: what recall's are told, which suits any."""
    from actors.environments import conversation, recall, rubric, search

    prompts = {
        one.__name__.rpartition(".")[2]: one.SYSTEM_PROMPT for one in (recall, conversation, search, rubric)
    }
    return prompts.get(config.environment.name, recall.SYSTEM_PROMPT)
