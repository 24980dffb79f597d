"""Everything that a user's mistake can break, done before Ray or an engine starts: so it fails in a second, in one line.

RunConfig --> environment (reads its file) --> model (on disk) --> checkpoint --> run folder --> Preparation
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.environments.base import Environment
from actors.environments.build import build_environment
from actors.fast_weights.basis import compute_basis_from_checkpoint, load_basis, save_basis
from actors.fast_weights.delta import Basis
from actors.memory.build import custom_memory
from actors.protocols import TaskError
from actors.types import Task
from cluster.common.errors import CheckpointError
from cluster.common.tasks import TaskSource
from cluster.runs.checkpoint import Checkpoint, find_checkpoint
from cluster.runs.resume import begun_run, new_run, run_id_of
from cluster.runs.run_lock import require_free
from cluster.train.warm_start import require_demonstrations
from configs.load import flatten, load_config, to_yaml
from configs.models import resolve_model
from configs.schema import RunConfig
from learner.advantage import estimator

BASIS_FILE = "basis.safetensors"  # in the folder of a run
KEPT = (  # settings and sections that a training goes on with: its rows are measured under them, and the report compares the last with the first
    "seed",
    "model",
    "environment",
    "embedder",
    "memory",
    "fast_weights",
    "write",
    "sampling.max_answer_tokens",
    "rollout.max_turns",
    "evaluation.temperature",
)


@dataclass(frozen=True, slots=True, eq=False)
class Preparation:
    """A run that can start. ``model_path`` is the base model; ``policy_path`` the weights to begin with (a checkpoint's when there is one)."""

    config: RunConfig
    environment: Environment
    model_path: Path
    checkpoint: Checkpoint | None
    run_dir: Path
    eval_tasks: tuple[Task, ...]
    tracking_run_id: str  # of the MLflow run that goes on; empty for a new one

    @property
    def policy_path(self) -> Path:
        return self.model_path if self.checkpoint is None else self.checkpoint.model

    @property
    def basis_path(self) -> Path:
        return self.run_dir / BASIS_FILE

    @property
    def config_path(self) -> Path:
        return self.run_dir / "config.yaml"

    @property
    def timeline_path(self) -> Path:
        return self.run_dir / "timeline.jsonl"

    @property
    def output_dir(self) -> Path:
        return self.run_dir.parent


def prepare_training(config: RunConfig) -> Preparation:
    """Raises TaskError, ModelError, CheckpointError, ValueError: one line each. Creates the run folder last, when nothing else can fail."""
    estimator(config.objective)  # the user's own are found now, not by a worker
    environment, tasks = _tasks(config)
    require_demonstrations(config, environment)
    model = resolve_model(config.model)
    output_dir = Path(config.output_dir).expanduser().absolute()
    checkpoint = find_checkpoint(config.resume, output_dir)
    begun = begun_run(output_dir, config, checkpoint) if config.resume == "auto" else None
    if begun is not None:
        run_dir, run_id, checkpoint = begun, run_id_of(begun), None
    elif checkpoint is not None:
        check_unchanged(config, checkpoint, KEPT)
        run_dir, run_id = checkpoint.run_dir, checkpoint.state.tracking_run_id
    else:
        run_dir, run_id = new_run(output_dir, config.name), ""
    require_free(run_dir)
    return _with_files(Preparation(config, environment, model.path, checkpoint, run_dir, tasks, run_id))


def open_environment(config: RunConfig) -> Environment:
    """The environment with its files read, and the memory if it is the user's own. Raises TaskError, ExtensionError."""
    if config.memory.policy == "custom":
        custom_memory(config.memory)
    try:
        return build_environment(config.environment, config.embedder)
    except ValueError as error:  # settings that only the environment can judge
        raise TaskError(str(error)) from error


def held_out(environment: Environment, config: RunConfig) -> tuple[Task, ...]:
    """The first ``evaluation.tasks`` of the eval split, fewer when it has fewer. Raises TaskError."""
    return tuple(TaskSource(environment, "eval", config.seed).first(config.evaluation.tasks))


def run_basis(model_path: Path, config: RunConfig) -> Basis:
    """The basis of a run that starts from the weights in ``model_path``. Raises BasisError."""
    return compute_basis_from_checkpoint(model_path, config.fast_weights, config.seed)


def _tasks(config: RunConfig) -> tuple[Environment, tuple[Task, ...]]:
    environment = open_environment(config)
    TaskSource(environment, "train", config.seed).first(1)
    return environment, held_out(environment, config)


def _with_files(preparation: Preparation) -> Preparation:
    """The run folder with config and basis. A basis belongs to the weights that the run started from: a resumed run keeps its own."""
    if preparation.basis_path.exists():
        basis = None
    elif preparation.checkpoint is not None:
        basis = load_basis(preparation.checkpoint.run_dir / BASIS_FILE)
    else:
        basis = run_basis(
            preparation.model_path, preparation.config
        )  # before the folder: a calibration text may be missing
    preparation.run_dir.mkdir(parents=True, exist_ok=True)
    preparation.config_path.write_text(to_yaml(preparation.config), encoding="utf-8")
    if basis is not None:
        save_basis(basis, preparation.basis_path)
    return preparation


def check_unchanged(config: RunConfig, checkpoint: Checkpoint, keys: tuple[str, ...]) -> None:
    """What must not change between a checkpoint and what goes on from it: otherwise weights, basis, task positions or rows lose their meaning.

    ``keys`` are settings, or sections of them.
    """
    saved, given = flatten(load_config(checkpoint.folder / "config.yaml", [])), flatten(config)
    changed = [
        key for key in saved if (key in keys or key.split(".")[0] in keys) and saved[key] != given[key]
    ]
    if changed:
        key = changed[0]
        raise CheckpointError(
            f"{checkpoint.folder} was made with {key}={saved[key]}, not {given[key]}: use that value, or start anew"
        )
