"""Prepares a training: all that a user's mistake can break fails here, in a second and in one line.

    RunConfig --> environment (reads its file) --> model (on disk) --> checkpoint --> run folder
              --> RunSpec: what the run is made of   RunFolder: where it lies   Start: what it begins from

Ray and the engines start only afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.environments.base import Attributor, Environment, Preparer
from actors.environments.build import build_environment
from actors.fast_weights.basis import compute_basis_from_checkpoint, load_basis, save_basis
from actors.fast_weights.delta import Basis
from actors.memory.build import custom_memory
from actors.memory.parametric import require_window
from actors.protocols import TaskError
from actors.text.chat_template import open_chat
from actors.types import Task
from cluster.common.day import day_in, with_day
from cluster.common.errors import CheckpointError
from cluster.common.folders import output_folder, require_writable
from cluster.common.tasks import TaskSource
from cluster.fleet.ray_runtime import Demand, demand, require_gpus
from cluster.runs.checkpoint import START, Checkpoint, TrainState
from cluster.runs.from_store import bring_named, bring_unfinished, newest_number
from cluster.runs.resume import find_checkpoint, find_in_run, find_unfinished, is_run, run_id_of
from cluster.runs.run_folders import create_run
from cluster.runs.run_lock import require_free
from cluster.runs.store import Store, StoreError
from cluster.sizing.machine import this_machine
from cluster.sizing.plan import make_plan
from cluster.tracking.tracker import require_server
from cluster.train.demonstrations import require_demonstrations, require_sources
from configs.curriculum import stages
from configs.files import write_text
from configs.load import ConfigError, flatten, load_config, to_yaml
from configs.models import require_positions, resolve_model
from configs.schema import RunConfig
from configs.shapes import ModelShape
from configs.store_url import is_url
from learner.advantage import estimator

_log = logging.getLogger(__name__)
BASIS_FILE = "basis.safetensors"  # in the folder of a run
_BASIS = "computing the basis of the fast weights from the policy: up to a minute, once a run"
_TRIED = 3  # training tasks: where none can be made, no other will
KEPT = (
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
"""Settings and sections that a resumed training keeps: its rows are measured under them, and compared."""
KEPT_OF_LORA = ("learner.trainable", "learner.lora_rank", "learner.lora_alpha", "learner.lora_targets")
"""What a resumed training also keeps where it trains a LoRA, or did: the factors stand for nothing else."""


@dataclass(frozen=True, slots=True, eq=False)
class RunSpec:
    """What a run is made of.

    ``model_path`` is the base model, ``eval_tasks`` are held-out tasks, ``stage_environments`` those of the
    curriculum's stages.
    """

    config: RunConfig
    environment: Environment
    model_path: Path
    eval_tasks: tuple[Task, ...]
    stage_environments: tuple[Environment, ...] = ()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run, and the files in it.

    ``in_use`` are checkpoints that the run's processes still read: workers that replace lost ones start from
    what the run was resumed from. ``saved`` is called when something in the folder is whole; it returns at
    once.
    """

    path: Path
    in_use: tuple[Path, ...] = ()
    saved: Callable[[], None] = lambda: None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def basis(self) -> Path:
        return self.path / BASIS_FILE

    @property
    def report(self) -> Path:
        return self.path / "report"

    def row(self, key: str) -> Path:
        """The file of an evaluated row."""
        return self.path / "evaluation" / f"{key}.json"


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins from: nothing, or a checkpoint of an earlier process.

    ``policy_path`` holds the weights of ``state.version``: the base model's, or the checkpoint's.
    """

    checkpoint: Checkpoint | None
    state: TrainState
    policy_path: Path


def prepare_training(
    config: RunConfig, refused: Collection[Path] = (), say: Callable[[str], None] = lambda _: None
) -> tuple[RunSpec, RunFolder, Start]:
    """Check everything, then create the run folder; one that is resumed is changed by ``write_config`` alone.

    ``resume=auto`` passes over the checkpoints in ``refused``. ``say`` hears what takes long.
    Raises TaskError, ModelError, CheckpointError, InUseError, ValueError: one line each.
    """
    require_machine(config, demand(config, learner=True))
    _require_deadlines(config)
    _refuse_control(config)
    _require_trained_tokens(config)
    estimator(config.objective)  # a user's own is found now, not by a worker
    environment = open_environment(config)
    TaskSource(environment, "train", config.seed).first(_TRIED)
    eval_tasks = held_out(environment, config)
    require_demonstrations(config, environment)
    of_stages = tuple(_open_stages(config))
    for each in (environment, *of_stages):
        _require_attribution(config, each)
    model = resolve_model(config.model)
    require_positions(model, config.engine)
    _warn_of_shortages(config, model)
    spec = RunSpec(config, environment, model.path, eval_tasks, of_stages)
    chat = open_chat(spec.model_path, config.model)
    questions = questions_of(config, environment, eval_tasks)
    for each in of_stages:
        questions += questions_of(config, each, TaskSource(each, "train", config.seed).first(_TRIED))
    require_window(config, chat, questions)
    folder, start = _where_to_start(spec, refused)
    _require_stage(config, start)
    if start.checkpoint is None or config.train.control == "supervised":
        require_sources(config, environment, chat)
    before = None if folder is None else folder.config
    if start.checkpoint is not None:
        before = start.checkpoint.folder / "config.yaml"
    spec = replace(spec, config=with_day(config, chat, "" if before is None else day_in(before)))
    if folder is None:
        folder = _create_folder(spec, say)
    require_free(folder.path)
    if not folder.basis.exists() and start.checkpoint is None:
        say(_BASIS)
        save_basis(run_basis(spec.model_path, spec.config), folder.basis)
    load_basis(folder.basis)  # of the weights that the run started from: a resumed run keeps its own
    return spec, folder, start


def require_machine(config: RunConfig, needed: Demand) -> None:
    """Check what the run needs of this machine and its surroundings, in seconds.

    Raises ConfigError for ``output_dir``, MachineError for GPUs, TrackingError for MLflow's server.
    """
    output_dir = output_folder(config)
    require_writable(output_dir, "store.work_dir" if is_url(config.output_dir) else "output_dir")
    _require_store(config)
    require_server(config.tracking, output_dir)
    require_gpus(config, needed)


def _require_store(config: RunConfig) -> None:
    """Raise ConfigError where the store refuses what is put there. One that is away may come back."""
    if not is_url(config.output_dir):
        return
    try:
        Store(config.output_dir, config.store.timeout_s).require_writable()
    except StoreError as error:
        _log.warning("warning: %s: what is saved waits in %s", error, output_folder(config))
    if config.ray.address and not config.store.work_dir:
        _log.warning(
            "warning: with several machines set store.work_dir to a folder that all of them see: workers and "
            "learner read and write %s",
            output_folder(config),
        )


def _warn_of_shortages(config: RunConfig, model: ModelShape) -> None:
    """Say what will not fit here, by the arithmetic of ``engram plan``. A cluster's nodes may differ."""
    if not config.ray.address:
        for shortage in make_plan(config, model, this_machine()).shortages:
            _log.warning("this may not fit: %s", shortage)


def _require_deadlines(config: RunConfig) -> None:
    """Raise ConfigError where a group is late before its episodes are: healthy workers would be replaced."""
    group, episode = config.train.group_timeout_s, config.rollout.episode_timeout_s
    if group <= episode:
        raise ConfigError(
            f"train.group_timeout_s={group:g} is not allowed: it must be more than "
            f"rollout.episode_timeout_s={episode:g}, else a worker whose episode is merely late is replaced"
        )


def _refuse_control(config: RunConfig) -> None:
    """Raise ConfigError for a control: gold cards were not sampled, and other questions earn no reward."""
    control = config.memory.control
    if control != "none":
        cure = "measure it with `engram evaluate --rows`, or with evaluation.control_rows=true"
        raise ConfigError(f"memory.control={control} is for evaluation and cannot be trained with; {cure}")


def _require_trained_tokens(config: RunConfig) -> None:
    """Raise ConfigError where an episode has no token to train: its memory writes no text."""
    policy, tokens = config.memory.policy, config.objective.tokens
    answers = tokens != "cards" and config.sampling.of_answers > 0
    if config.train.steps > 0 and policy in ("full", "truncation") and not answers:
        raise ConfigError(
            f"memory.policy={policy} writes no text, and no answer is trained with objective.tokens={tokens} "
            f"and answers sampled at {config.sampling.of_answers:g}: nothing is left to train; "
            "set objective.tokens=both and a temperature above 0"
        )


def _open_stages(config: RunConfig) -> Iterator[Environment]:
    """The environments of the curriculum, each with a task. Raises TaskError: it names the stage."""
    for place, stage in enumerate(stages(config)):
        try:
            environment = open_environment(replace(config, environment=stage.environment))
            TaskSource(environment, "train", config.seed).first(_TRIED)
        except TaskError as error:
            raise TaskError(f"curriculum.stages[{place}]: {error}") from error
        yield environment


def _require_stage(config: RunConfig, start: Start) -> None:
    """Raise CheckpointError where the checkpoint stands in a stage that the curriculum does not have."""
    stage, there = start.state.curriculum.stage, len(config.curriculum.stages)
    if start.checkpoint is not None and stage > 0 and stage >= there:
        raise CheckpointError(
            f"{start.checkpoint.folder} stands in stage {stage + 1} of its curriculum, and "
            f"curriculum.stages has {there}: give it as many, or start anew"
        )


def _require_attribution(config: RunConfig, environment: Environment) -> None:
    """Raise TaskError where credit is by question and the environment does not say which a card served."""
    if config.objective.credit == "question" and not isinstance(environment, Attributor):
        raise TaskError(
            f"objective.credit=question is not possible: the environment {environment.name} does not say "
            "which question a flashcard served (Attributor in actors/environments/base.py); "
            "set objective.credit=episode"
        )


def _where_to_start(spec: RunSpec, refused: Collection[Path]) -> tuple[RunFolder | None, Start]:
    """Choose a new run (no folder yet), a run without a checkpoint, or a checkpoint."""
    config, new = spec.config, Start(None, START, spec.model_path)
    if not config.resume:
        return None, new
    if config.resume == "auto":
        if is_url(config.output_dir) and not refused:
            bring_unfinished(config)
        found = find_unfinished(output_folder(config), config, refused)
    else:
        named = bring_named(config)
        found = find_in_run(named, config, refused) if is_run(named) else find_checkpoint(named)
    if found is None:
        return None, new
    if isinstance(found, Path):
        return RunFolder(found), replace(new, state=replace(START, tracking_run_id=run_id_of(found)))
    require_same_meaning(config, found)
    return RunFolder(found.run_dir, (found.folder,)), Start(found, found.state, found.model)


def _create_folder(spec: RunSpec, say: Callable[[str], None]) -> RunFolder:
    """Create the folder of a new run with config and basis."""
    say(_BASIS)
    basis = run_basis(spec.model_path, spec.config)  # before the folder: a calibration text may be missing
    config, name = spec.config, spec.config.name
    folder = RunFolder(create_run(output_folder(config), name, newest_number(config, name)))
    save_basis(basis, folder.basis)
    write_text(folder.config, to_yaml(spec.config))  # last: a run with a config is whole
    return folder


def write_config(spec: RunSpec, folder: RunFolder) -> None:
    """Write the config that the run goes on with. The caller holds its lock: nobody else's is overwritten."""
    write_text(folder.config, to_yaml(spec.config))


def open_environment(config: RunConfig) -> Environment:
    """Build the environment, which reads its files, and find the memory if it is the user's own.

    Raises TaskError, ExtensionError.
    """
    if config.memory.policy == "custom":
        custom_memory(config.memory)
    try:
        return build_environment(config.environment, config.embedder)
    except ValueError as error:  # settings that only the environment can judge
        raise TaskError(str(error)) from error


def held_out(environment: Environment, config: RunConfig) -> tuple[Task, ...]:
    """The first ``evaluation.tasks`` of the eval split, fewer when it has fewer. Raises TaskError."""
    return tuple(TaskSource(environment, "eval", config.seed).first(config.evaluation.tasks))


def questions_of(config: RunConfig, environment: Environment, tasks: Sequence[Task]) -> list[str]:
    """The questions of ``tasks`` in memory-writing prompts; none where these are blind. Raises TaskError.

    Some environments start slowly, outside of a worker too: one that prepares itself, or others' code. Their
    questions stay unknown.
    """
    slow = isinstance(environment, Preparer) or config.environment.starts_slowly
    return (
        []
        if slow or config.memory.question_blind
        else [environment.start(task).question for task in tasks if not task.fault]
    )


def run_basis(model_path: Path, config: RunConfig) -> Basis:
    """Compute the basis of a run that starts from the weights in ``model_path``. Raises BasisError."""
    return compute_basis_from_checkpoint(model_path, config.fast_weights, config.seed)


def require_same_meaning(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a resumed training has other settings that give its state a meaning."""
    check_unchanged(config, checkpoint, KEPT)
    before = load_config(checkpoint.folder / "config.yaml", [])
    if "lora" in (config.learner.trainable, before.learner.trainable):
        check_unchanged(config, checkpoint, KEPT_OF_LORA)


def check_unchanged(config: RunConfig, checkpoint: Checkpoint, keys: tuple[str, ...]) -> None:
    """Raise CheckpointError when a setting of ``keys`` (settings, or sections) differs from the checkpoint's.

    Otherwise weights, basis, task positions or rows would lose their meaning.
    """
    saved, given = flatten(load_config(checkpoint.folder / "config.yaml", [])), flatten(config)
    given["model.date"] = given["model.date"] or saved["model.date"]
    for key in saved:
        if (key in keys or key.split(".")[0] in keys) and saved[key] != given[key]:
            raise CheckpointError(
                f"{checkpoint.folder} was made with {key}={saved[key]}, not {given[key]}: "
                "use that value, or start anew"
            )
