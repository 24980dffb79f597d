"""Opens a model for conversation. Everything that a mistake can break comes first, the engine last.

    what the user names --locate--> Source --open_source--> Opening --parts_of--> Parts (a running engine)

smollm2-135m | folder | hub name            settings of configs/chat.yaml (or --config); the basis is computed
a run's folder | one of its checkpoints     its own config.yaml and basis
a folder that ``export`` wrote              the settings and the basis that export put into it

``serve`` gets a context and replies of its own (``for_serving``): a run may have been trained with 54 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import configs
from actors.episodes.preservation import Preservation, preservation
from actors.fast_weights.delta import Basis
from actors.memory.parametric import require_window
from actors.protocols import AsyncWriter
from actors.speech import SpeakingPolicy
from actors.text.chat_template import ChatFormat, open_chat
from actors.types import AdapterKey
from cluster.runs.checkpoint import COMPANION, Checkpoint, list_checkpoints, load_checkpoint
from cluster.runs.from_store import local_copy
from configs.bounds import BoundError
from configs.foreign import FLAG
from configs.load import load_config
from configs.mixture import environments
from configs.models import ResolvedModel, resolve_model
from configs.schema import RunConfig

_WINDOW = "engine.max_model_tokens"
_KEYS = (
    "memory.max_context_tokens",
    "memory.max_extract_tokens",
    "sampling.max_answer_tokens",
    _WINDOW,
    "engine.kv_cache_gib",
)

PRESET = Path(configs.__file__).parent / "chat.yaml"
# The names of these two files in a run's folder, and in the companion folder of an exported model.
BASIS_FILE = "basis.safetensors"
CONFIG_FILE = "config.yaml"


class AssistantError(ValueError):
    """A user's mistake in ``chat``, ``serve``, ``memory`` or ``export``. One line."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights and settings come from.

    Without a ``basis_path`` the basis is computed from the weights.
    """

    model: str
    config_path: Path
    basis_path: Path | None


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """All that is known before an engine starts.

    ``title`` is what the user typed; ``model`` is on this machine.
    """

    title: str
    config: RunConfig
    model: ResolvedModel
    basis: Basis
    system_prompt: str

    @property
    def base_model(self) -> str:
        """The base model that an adapter names: a hub's name if it has one, else the folder."""
        name = self.config.model.name
        return name if is_hub_name(name) else str(self.model.path)


class ScoringPolicy(SpeakingPolicy, Protocol):
    """A policy that speaks, and says how well it knows a text: VLLMPolicy."""

    async def score(self, token_ids: Sequence[int], adapter: AdapterKey) -> list[float]:
        """Log-probs of tokens 1..n-1, each given those before it. Raises EngineError."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What conversations share. The policy version never changes.

    ``failure`` returns why the engine is dead, or "" while it serves.
    """

    opening: Opening
    policy: ScoringPolicy
    writer: AsyncWriter
    chat: ChatFormat
    preservation: Preservation | None
    failure: Callable[[], str]


def is_hub_name(name: str) -> bool:
    """Return whether the model ``name`` lies on a hub, and not in a folder of that name."""
    return name.count("/") == 1 and not Path(name).expanduser().exists()


def find_checkpoint_of(folder: Path) -> Checkpoint | None:
    """Return ``folder`` as a checkpoint, or the newest checkpoint of the run in it; None if it is neither.

    Raises CheckpointError for a damaged checkpoint.
    """
    if (folder / "state.json").exists():
        return load_checkpoint(folder)
    checkpoints = list_checkpoints(folder)
    return load_checkpoint(checkpoints[-1]) if checkpoints else None


def locate(model: str) -> Source:
    """Find the weights and settings that ``model`` names. Raises CheckpointError, StoreError."""
    folder = local_copy(model, weights=True).expanduser().absolute()
    if folder.is_dir():
        if (checkpoint := find_checkpoint_of(folder)) is not None:
            config_path = checkpoint.folder / CONFIG_FILE
            return Source(str(checkpoint.model), config_path, checkpoint.run_dir / BASIS_FILE)
        companion = folder / COMPANION
        if (companion / BASIS_FILE).exists():
            return Source(str(folder), companion / CONFIG_FILE, companion / BASIS_FILE)
    return Source(model, PRESET, None)


def prepare_opening(
    model: str, config_path: Path | None, overrides: Sequence[str], allow_code: bool = False
) -> Opening:
    """Locate and open ``model``; starts no engine. The model's own settings run code if ``allow_code``.

    Raises ConfigError, ModelError, CheckpointError, BasisError or AssistantError, one line each.
    """
    return open_source(model, locate(model), config_path, overrides, allow_code)


def open_source(
    title: str, source: Source, config_path: Path | None, overrides: Sequence[str], allow_code: bool
) -> Opening:
    """Open ``source``; ``config_path`` replaces its own settings. Raises as ``prepare_opening`` does."""
    config = load_config(config_path or source.config_path, [*overrides, f"model.name={source.model}"])
    _check(config, source, overrides)
    said = config_path is not None or any(word.startswith("model.trust_remote_code=") for word in overrides)
    if config.model.trust_remote_code and not (allow_code or said):
        raise AssistantError(
            f"{title}: its settings say model.trust_remote_code=true, which runs code out of the model's "
            f"folder; if you trust it, give {FLAG} or say so yourself, else model.trust_remote_code=false"
        )
    model = resolve_model(config.model)
    system_prompt = config.assistant.system_prompt or _environment_prompt(config)
    return Opening(title, config, model, _basis(source, model.path, config), system_prompt)


@contextmanager
def parts_of(opening: Opening, slots: int) -> Iterator[Parts]:
    """Run an engine and its writer for ``slots`` concurrent conversations.

    Raises EngineError, ChatTemplateError, and BoundError where the engine's window is too small.
    """
    import torch

    from actors.engine.policy import VLLMPolicy
    from actors.episodes.rollout import WriteBatcher

    config, path = opening.config, opening.model.path
    threads = config.rollout.threads
    torch.set_num_threads(threads)
    chat = open_chat(path, config.model)
    require_window(config, chat, ())
    engine = replace(config.engine, slots=slots)
    policy = VLLMPolicy(
        path,
        config.model,
        engine,
        opening.basis,
        chat.stop_token_ids,
        0,
        threads,
        config.seed,
        tokenizer=True,
    )
    try:
        kept = preservation(policy, None, chat, opening.system_prompt, config)
        writer = WriteBatcher(policy.writer(config.write))
        yield Parts(opening, policy, writer, chat, kept, lambda: policy.failure)
    finally:
        policy.close()


def _basis(source: Source, path: Path, config: RunConfig) -> Basis:
    from actors.fast_weights.basis import compute_basis_from_checkpoint, load_basis

    if source.basis_path is not None:
        return load_basis(source.basis_path)
    return compute_basis_from_checkpoint(path, config.fast_weights, config.seed)


def _check(config: RunConfig, source: Source, overrides: Sequence[str]) -> None:
    def argument_for(key: str) -> str | None:
        return next((argument for argument in overrides if argument.startswith(key)), None)

    if (argument := argument_for("model.name=")) is not None:
        name = argument.partition("=")[2]
        raise AssistantError(f"argument {argument!r}: name the model without it, e.g. chat {name}")
    if (argument := argument_for("fast_weights.")) is not None and source.basis_path is not None:
        raise AssistantError(
            f"argument {argument!r}: {source.model} has its own basis, which cannot be changed; leave it out"
        )
    if config.memory.control != "none":
        raise AssistantError(f"memory.control={config.memory.control} is for evaluation; leave it out")
    if config.memory.policy != "parametric":
        raise AssistantError(
            f"memory.policy={config.memory.policy} keeps nothing in weights: "
            "a conversation needs memory.policy=parametric"
        )
    if config.write.epochs == 0:
        raise AssistantError("write.epochs=0 writes nothing: a conversation needs 1 or more")


def _environment_prompt(config: RunConfig) -> str:
    """The system prompt of the configured environment, of a mix the first one's.

    For a user's own it is recall's, which suits any.
    """
    from actors.environments import conversation, recall, rubric, search

    modules = (recall, conversation, search, rubric)
    prompts = {module.__name__.rpartition(".")[2]: module.SYSTEM_PROMPT for module in modules}
    environment = environments(config.environment)[0]
    configured = getattr(getattr(environment, environment.name, None), "system_prompt", "")
    return configured or prompts.get(environment.name, recall.SYSTEM_PROMPT)


def for_serving(opening: Opening, overrides: Sequence[str]) -> tuple[Opening, str]:
    """``opening`` with at least the sizes of configs/chat.yaml, and a line about what that changed, or "".

    Nothing changes where the model's window is smaller than that, where the user sets the window, or where
    the larger sizes do not fit beside those that stay.
    """
    floor, own = load_config(PRESET, []), opening.config
    given = {argument.partition("=")[0] for argument in overrides}
    window = opening.model.max_positions
    if _WINDOW in given or window < floor.engine.max_model_tokens:
        return opening, ""
    sections: dict[str, dict[str, float]] = {}
    changed = []
    for key in _KEYS:
        was, least = _value(own, key), _value(floor, key)
        if key not in given and was is not None and least is not None and was < least:
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = least
            changed.append(f"{key}={least:g} (trained with {was:g})")
    try:  # all at once: a larger context alone may not fit into the window as it was
        larger: dict[str, Any] = {name: replace(getattr(own, name), **new) for name, new in sections.items()}
        return replace(opening, config=replace(own, **larger)), ", ".join(changed)
    except BoundError:
        return opening, ""


def _value(config: RunConfig, key: str) -> float | None:
    section, _, name = key.partition(".")
    value: float | None = getattr(getattr(config, section), name)
    return value
