"""Everything that a user's mistake can break in an evaluation, done before Ray or an engine starts: it fails in seconds, in one line.

Request --> Plan --> each benchmark's tasks, the model, the checkpoint --> run folder, bases --> Comparison
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from actors.basis import load_basis, save_basis
from actors.fast_weights import Basis
from actors.types import PolicyVersion, Task
from cluster.checkpoint import Checkpoint, load_checkpoint
from cluster.comparison.arguments import REQUEST_FILE, save_request, saved_request
from cluster.comparison.plan import WRITING, Cell, Plan, Request, plan_cells
from cluster.comparison.store import CellStore
from cluster.prepare import BASIS_FILE, check_unchanged, held_out, open_environment, run_basis
from configs.load import load_config, to_yaml
from configs.models import ResolvedModel, resolve_model
from configs.schema import FastWeightsConfig, RunConfig


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """An evaluation that can start."""

    plan: Plan
    model: ResolvedModel
    checkpoint: Checkpoint | None
    folder: Path
    store: CellStore
    tasks: dict[str, tuple[Task, ...]]  # by the cell's key
    bases: dict[str, Path]  # by the cell's key

    @property
    def policy_path(self) -> Path:
        return self.model.path if self.checkpoint is None else self.checkpoint.model

    @property
    def version(self) -> PolicyVersion:
        return 0 if self.checkpoint is None else self.checkpoint.state.version

    @property
    def step(self) -> int:
        """Training steps behind the policy."""
        return 0 if self.checkpoint is None else self.checkpoint.state.step

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"


def prepare_comparison(request: Request) -> Comparison:
    """Raises ConfigError, TaskError, ModelError, CheckpointError, BasisError: one line each. Creates the folder last, when little else can fail."""
    plan = plan_cells(request)
    config = plan.base
    tasks = _tasks(plan)
    model = resolve_model(config.model)
    checkpoint = None if request.checkpoint is None else load_checkpoint(request.checkpoint.expanduser().absolute())
    if checkpoint is not None:
        check_unchanged(config, checkpoint, ("model",))
    folder = _resumed_folder(request, config) or _output_dir(config) / f"{config.name}-evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    store = CellStore(folder / "cells", _identity(model, checkpoint))
    for cell in plan.cells:  # a changed configuration is refused now, not after hours
        store.finished(cell)
        store.begun(cell)
    bases = _bases(plan, model.path, checkpoint, folder)
    comparison = Comparison(plan, model, checkpoint, folder, store, tasks, bases)
    comparison.config_path.write_text(to_yaml(config), encoding="utf-8")
    save_request(request, folder)
    return comparison


def _resumed_folder(request: Request, config: RunConfig) -> Path | None:
    """--resume FOLDER, or "auto": the newest evaluation of this name in the output folder, if there is one."""
    if request.resume in ("", "auto"):
        found = sorted(_output_dir(config).glob(f"{config.name}-evaluate-*/{REQUEST_FILE}")) if request.resume else []
        return found[-1].parent if found else None
    folder = Path(request.resume).expanduser().absolute()
    saved_request(folder)
    return folder


def _output_dir(config: RunConfig) -> Path:
    return Path(config.output_dir).expanduser().absolute()


def _tasks(plan: Plan) -> dict[str, tuple[Task, ...]]:
    """Every cell's, each data file read once."""
    configs = {cell.config.environment: cell.config for cell in plan.cells}
    environments = {environment: open_environment(config) for environment, config in configs.items()}
    return {cell.key: held_out(environments[cell.config.environment], cell.config) for cell in plan.cells}


def _identity(model: ResolvedModel, checkpoint: Checkpoint | None) -> dict[str, str]:
    """The weights: those of the model, or of a checkpoint by its name and steps (its folder may have been moved)."""
    policy = "the base model"
    if checkpoint is not None:
        policy = f"{checkpoint.run_dir.name}/{checkpoint.folder.name} version {checkpoint.state.version}"
    return {"weights of the model": model.fingerprint[:16], "policy": policy}


def _bases(plan: Plan, model: Path, checkpoint: Checkpoint | None, folder: Path) -> dict[str, Path]:
    """The basis of every cell, one file for those that share it.

    A checkpoint's policy learnt with its run's own basis, which is used where the fast weights are as in that run. Any other is computed from the
    base model's weights, as that one was.
    """
    trained = None if checkpoint is None else load_config(checkpoint.folder / "config.yaml", []).fast_weights
    files: dict[str, Path] = {}
    made: dict[tuple[FastWeightsConfig, int], tuple[Path, Basis]] = {}
    for cell in plan.cells:
        if checkpoint is not None and cell.config.fast_weights == trained:
            files[cell.key] = checkpoint.run_dir / BASIS_FILE
            load_basis(files[cell.key])  # a damaged one is found now
            continue
        kind = (cell.config.fast_weights, _basis_seed(cell))
        if kind not in made:
            made[kind] = folder / "bases" / f"{len(made)}.safetensors", run_basis(model, cell.config)
        files[cell.key] = made[kind][0]
    (folder / "bases").mkdir(parents=True, exist_ok=True)  # only now that every basis could be computed
    for path, basis in made.values():
        save_basis(basis, path)
    return files


def _basis_seed(cell: Cell) -> int:
    """Only a random A differs by seed, and only to who writes: all else shares one basis, and so its workers, over the seeds."""
    return cell.config.seed if cell.config.fast_weights.basis == "random" and cell.config.memory.policy in WRITING else 0
