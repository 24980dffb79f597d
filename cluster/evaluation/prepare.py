"""Everything that a user's mistake can break in an evaluation, done before Ray or an engine starts: it fails in seconds, in one line.

Request --> Plan --> each benchmark's tasks, the model, the checkpoint --> run folder, bases --> Comparison
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from actors.fast_weights.basis import load_basis, save_basis
from actors.fast_weights.delta import Basis
from actors.memory.build import custom_memory
from actors.types import PolicyVersion, Task
from cluster.evaluation.arguments import REQUEST_FILE, save_request, saved_request
from cluster.evaluation.plan import WRITING, Cell, Plan, Request, plan_cells
from cluster.evaluation.store import CellStore
from cluster.runs.checkpoint import Checkpoint, load_checkpoint
from cluster.runs.run_lock import held, require_free
from cluster.train.prepare import BASIS_FILE, check_unchanged, held_out, open_environment, run_basis
from configs.load import ConfigError, load_config, to_yaml
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
    """Raises ConfigError, TaskError, ExtensionError, ModelError, CheckpointError, BasisError, InUseError: one line each.

    Creates the folder last, when little else can fail; one that another process works in is left as it is.
    """
    plan = plan_cells(request)
    config = plan.base
    tasks = _tasks(plan)
    model = resolve_model(config.model)
    checkpoint = (
        None if request.checkpoint is None else load_checkpoint(request.checkpoint.expanduser().absolute())
    )
    if checkpoint is not None:
        check_unchanged(config, checkpoint, ("model",))
    folder = (
        _resumed_folder(request, config)
        or _output_dir(config) / f"{config.name}-evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    with _writing(folder):
        require_free(folder)  # now: a basis may take minutes
    store = CellStore(folder / "cells", _identity(model, checkpoint))
    for cell in plan.cells:  # a changed configuration is refused now, not after hours
        store.finished(cell)
        store.begun(cell)
    bases, made = _bases(plan, model.path, checkpoint, folder)
    comparison = Comparison(plan, model, checkpoint, folder, store, tasks, bases)
    _save(comparison, request, made)
    return comparison


def _save(comparison: Comparison, request: Request, bases: Mapping[Path, Basis]) -> None:
    """All that the folder holds before the first cell. Raises ConfigError, and InUseError when another process began in it meanwhile."""
    folder = comparison.folder
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            for path, basis in bases.items():
                save_basis(basis, path)
            comparison.config_path.write_text(to_yaml(comparison.plan.base), encoding="utf-8")
            save_request(request, folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises ConfigError where ``folder`` cannot be made or written in the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{folder}: cannot be written ({reason}); make room or get the right to it, or give another output_dir=FOLDER"
        ) from error


def _resumed_folder(request: Request, config: RunConfig) -> Path | None:
    """--resume FOLDER, or "auto": the newest evaluation of this name in the output folder, if there is one."""
    if request.resume in ("", "auto"):
        found = (
            sorted(_output_dir(config).glob(f"{config.name}-evaluate-*/{REQUEST_FILE}"))
            if request.resume
            else []
        )
        return found[-1].parent if found else None
    folder = Path(request.resume).expanduser().absolute()
    saved_request(folder)
    return folder


def _output_dir(config: RunConfig) -> Path:
    return Path(config.output_dir).expanduser().absolute()


def _tasks(plan: Plan) -> dict[str, tuple[Task, ...]]:
    """Every cell's, each data file read once. A row's own memory is found now, not by a worker."""
    for cell in plan.cells:
        if cell.config.memory.policy == "custom":
            custom_memory(cell.config.memory)
    configs = {cell.config.environment: cell.config for cell in plan.cells}
    environments = {environment: open_environment(config) for environment, config in configs.items()}
    return {cell.key: held_out(environments[cell.config.environment], cell.config) for cell in plan.cells}


def _identity(model: ResolvedModel, checkpoint: Checkpoint | None) -> dict[str, str]:
    """The weights: those of the model, or of a checkpoint by its name and steps (its folder may have been moved)."""
    policy = "the base model"
    if checkpoint is not None:
        policy = f"{checkpoint.run_dir.name}/{checkpoint.folder.name} version {checkpoint.state.version}"
    return {"weights of the model": model.fingerprint[:16], "policy": policy}


def _bases(
    plan: Plan, model: Path, checkpoint: Checkpoint | None, folder: Path
) -> tuple[dict[str, Path], dict[Path, Basis]]:
    """The file of every cell's basis, one for those that share it, and what is to be written to those of ``folder``.

    A checkpoint's policy learnt with its run's own basis, which is used where the fast weights are as in that run. Any other is computed from the
    base model's weights, as that one was. Its file is named by its content: no request, whatever its rows, turns it into another basis.
    """
    trained = None if checkpoint is None else load_config(checkpoint.folder / "config.yaml", []).fast_weights
    files: dict[str, Path] = {}
    shared: dict[tuple[FastWeightsConfig, int], Path] = {}
    made: dict[Path, Basis] = {}
    for cell in plan.cells:
        if checkpoint is not None and cell.config.fast_weights == trained:
            files[cell.key] = checkpoint.run_dir / BASIS_FILE
            load_basis(files[cell.key])  # a damaged one is found now
            continue
        kind = (cell.config.fast_weights, _basis_seed(cell, plan.base.seed))
        if kind not in shared:
            basis = run_basis(model, replace(cell.config, seed=kind[1]))
            shared[kind] = folder / "bases" / f"{basis.id}.safetensors"
            made[shared[kind]] = basis
        files[cell.key] = shared[kind]
    return files, made


def _basis_seed(cell: Cell, base: int) -> int:
    """A random A differs by seed, to who writes. All else shares one basis, and so its workers, over the seeds; what of it is measured on samples
    (fast_weights.sensitivity_rank) is measured under the configuration's seed, whichever ``--seeds`` are asked for or left.
    """
    return (
        cell.config.seed
        if cell.config.fast_weights.basis == "random" and cell.config.memory.policy in WRITING
        else base
    )
