"""Prepare an evaluation before Ray or an engine starts: a user's mistake fails in seconds, in one line.

Request --> Plan --> each benchmark's tasks, the model, the checkpoint --> run folder, bases --> Comparison
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from actors.environments.base import Environment
from actors.episodes.controls import require_control
from actors.fast_weights.basis import load_basis, save_basis
from actors.fast_weights.delta import Basis
from actors.memory.build import custom_memory
from actors.memory.parametric import require_window
from actors.text.chat_template import ChatFormat, open_chat
from actors.types import PolicyVersion, Task
from cluster.common.day import day_in, with_day
from cluster.common.folders import output_folder
from cluster.evaluation.command import REQUEST_FILE, save_request, saved_request
from cluster.evaluation.plan import WRITING, Cell, Plan, Request, plan_cells
from cluster.evaluation.store import CellStore
from cluster.fleet.ray_runtime import demand, require_gpus
from cluster.runs.checkpoint import Checkpoint, load_played
from cluster.runs.from_store import bring_newest, newest_number
from cluster.runs.run_folders import create_run, runs_of
from cluster.runs.run_lock import held, require_free
from cluster.train.prepare import (
    BASIS_FILE,
    check_unchanged,
    held_out,
    open_environment,
    questions_of,
    require_machine,
    run_basis,
)
from configs.bounds import BoundError
from configs.files import write_text
from configs.load import ConfigError, load_config, to_yaml
from configs.models import ResolvedModel, require_positions, resolve_model
from configs.schema import EnvironmentConfig, FastWeightsConfig, RunConfig
from configs.store_url import is_url


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
    """Check everything, then create the folder. A folder that another process works in is left as it is.

    Raises ConfigError, TaskError, ExtensionError, ModelError, CheckpointError, BasisError and InUseError,
    each in one line.
    """
    plan = plan_cells(request)
    config = plan.base
    require_machine(config, demand(config, learner=False))
    for cell in plan.cells:
        require_gpus(cell.config, demand(cell.config, learner=False))
    environments = _environments(plan)
    tasks = {cell.key: held_out(environments[cell.config.environment], cell.config) for cell in plan.cells}
    model = resolve_model(config.model)
    for cell in plan.cells:
        require_positions(model, cell.config.engine)
    chat = open_chat(model.path, config.model)
    _require_windows(plan, environments, tasks, chat)
    checkpoint = None
    if request.checkpoint is not None:
        checkpoint = load_played(request.checkpoint.expanduser().absolute())
        check_unchanged(config, checkpoint, ("model",))
    resumed = _resumed_folder(request, config)
    if resumed is not None:
        with _writing(resumed):
            require_free(resumed)  # now: a basis may take minutes
    before = resumed if checkpoint is None else checkpoint.folder
    plan = _with_day(plan, chat, "" if before is None else day_in(before / "config.yaml"))
    if resumed is not None:  # a changed configuration is refused now, not after hours
        store = CellStore(resumed / "cells", _identity(model, checkpoint))
        for cell in plan.cells:
            store.finished(cell)
            store.begun(cell)
    bases, made = _bases(plan, model.path, checkpoint)
    folder = resumed
    if folder is None:  # last: a mistake above leaves none
        with _writing(output_folder(config)):
            name = f"{config.name}-evaluate"
            folder = create_run(output_folder(config), name, newest_number(config, name))
    bases = {key: folder / path for key, path in bases.items()}
    made = {folder / path: basis for path, basis in made.items()}
    store = CellStore(folder / "cells", _identity(model, checkpoint))
    comparison = Comparison(plan, model, checkpoint, folder, store, tasks, bases)
    _save(comparison, request, made)
    return comparison


def _save(comparison: Comparison, request: Request, bases: Mapping[Path, Basis]) -> None:
    """Write what the folder holds before the first cell.

    Raises ConfigError, and InUseError when another process has taken the folder meanwhile.
    """
    folder = comparison.folder
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            for path, basis in bases.items():
                save_basis(basis, path)
            write_text(comparison.config_path, to_yaml(comparison.plan.base))
            save_request(request, folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise ConfigError where the block cannot make or write ``folder``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        cure = "make room or get the right to it, or give another output_dir=FOLDER"
        raise ConfigError(f"{folder}: cannot be written ({reason}); {cure}") from error


def _resumed_folder(request: Request, config: RunConfig) -> Path | None:
    """--resume FOLDER, or "auto": the newest evaluation of this name in the output folder, if any."""
    if not request.resume:
        return None
    if request.resume == "auto":
        if is_url(config.output_dir):
            bring_newest(config, f"{config.name}-evaluate")
        runs = runs_of(output_folder(config), f"{config.name}-evaluate")
        return next((run for run in runs if (run / REQUEST_FILE).is_file()), None)
    folder = Path(request.resume).expanduser().absolute()
    saved_request(folder)
    return folder


def _environments(plan: Plan) -> dict[EnvironmentConfig, Environment]:
    """The environments of all cells; each data file is read once.

    A custom memory that is missing, and a control that the environment cannot make, fail here.
    """
    for cell in plan.cells:
        if cell.config.memory.policy == "custom":
            custom_memory(cell.config.memory)
    configs = {cell.config.environment: cell.config for cell in plan.cells}
    environments = {environment: open_environment(config) for environment, config in configs.items()}
    for cell in plan.cells:
        require_control(cell.config.memory, environments[cell.config.environment])
    return environments


def _require_windows(
    plan: Plan,
    environments: Mapping[EnvironmentConfig, Environment],
    tasks: Mapping[str, Sequence[Task]],
    chat: ChatFormat,
) -> None:
    """Raise ConfigError where a cell's extractions do not fit the engine's window."""
    questions: dict[tuple[EnvironmentConfig, int, bool], list[str]] = {}  # starting a task may read a file
    for cell in plan.cells:
        config = cell.config
        kind = (config.environment, config.seed, config.memory.question_blind)
        if kind not in questions:
            questions[kind] = questions_of(config, environments[config.environment], tasks[cell.key])
        try:
            require_window(config, chat, questions[kind])
        except BoundError as error:
            raise ConfigError(f"{cell.key}: {error}") from None


def _with_day(plan: Plan, chat: ChatFormat, day: str) -> Plan:
    base = with_day(plan.base, chat, day)
    cells = (replace(cell, config=with_day(cell.config, chat, base.model.date)) for cell in plan.cells)
    return replace(plan, base=base, cells=tuple(cells))


def _identity(model: ResolvedModel, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Name the weights: the model's, or a checkpoint's by name and version (its folder may have moved)."""
    policy = "the base model"
    if checkpoint is not None:
        policy = f"{checkpoint.title} version {checkpoint.state.version}"
    return {"weights of the model": model.fingerprint[:16], "policy": policy}


def _bases(
    plan: Plan, model: Path, checkpoint: Checkpoint | None
) -> tuple[dict[str, Path], dict[Path, Basis]]:
    """The basis file of every cell, by key, and the bases that are still to be written, by file.

    Files are relative to the evaluation's folder; a checkpoint's is absolute.
    A checkpoint's policy learnt with its run's basis: cells with the fast weights of that run use it. Any
    other basis is computed from the base model's weights, as that one was. Its file is named by its content,
    so no other request can change it.
    """
    trained = None if checkpoint is None else load_config(checkpoint.folder / "config.yaml", []).fast_weights
    files: dict[str, Path] = {}
    shared: dict[tuple[FastWeightsConfig, int], Path] = {}
    made: dict[Path, Basis] = {}
    for cell in plan.cells:
        if checkpoint is not None and cell.config.fast_weights == trained:
            files[cell.key] = checkpoint.run_dir / BASIS_FILE
            load_basis(files[cell.key])  # find a damaged file now
            continue
        kind = (cell.config.fast_weights, _basis_seed(cell, plan.base.seed))
        if kind not in shared:
            basis = run_basis(model, replace(cell.config, seed=kind[1]))
            shared[kind] = Path("bases") / f"{basis.id}.safetensors"
            made[shared[kind]] = basis
        files[cell.key] = shared[kind]
    return files, made


def _basis_seed(cell: Cell, base: int) -> int:
    """The seed that a cell's basis is drawn or measured with.

    A random A differs by seed, for a memory that writes. All other cells share one basis over the seeds, and
    so their workers. A sensitivity is measured on samples (fast_weights.sensitivity_rank), always under the
    configuration's own seed: it must not depend on which ``--seeds`` are given.
    """
    drawn = cell.config.fast_weights.basis == "random" and cell.config.memory.policy in WRITING
    return cell.config.seed if drawn else base
