"""Datasets and kept checkpoints in MLflow: what a run read, and its models with a name and aliases.

    Tracker.dataset, Tracker.model --outbox--> sender --> take_dataset, take_model

Both may be repeated: they look first for what MLflow holds. A checkpoint stays where it is; the tags of its
model say where. With tracking.models=upload MLflow has a copy, which ``mlflow.transformers`` loads.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.schema import EnvironmentConfig

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

Values = Mapping[str, str]
DataContext = Literal["training", "evaluation"]
_MODEL_TAGS = ("folder", "weights", "host", "held_out_f1", "held_out_reward")  # kept as engram.<name>


def dataset_values(environment: EnvironmentConfig, context: DataContext) -> dict[str, str]:
    """Name a source of tasks as MLflow names data: by its files and their content, else by its settings."""
    part = getattr(environment, environment.name)
    settings: dict[str, Any] = {"custom": environment.custom, "options": environment.options}
    if is_dataclass(part) and not isinstance(part, type):
        settings = asdict(part)
    files = [
        Path(value).expanduser()
        for key, value in settings.items()
        if (key.endswith("path") or (key == "tasks" and ":" not in str(value)))
        and isinstance(value, str)
        and value
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in files:
        if file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    made_by = {"tags": {"made by": f"actors.environments.{environment.name}"}}
    source = {"uri": str(files[0].absolute())} if files else made_by
    return {
        "name": " ".join([environment.name, *(file.name for file in files)])[:500],
        "digest": digest.hexdigest()[:32],
        "source_type": "local" if files else "code",
        "source": json.dumps(source),
        "profile": json.dumps(settings, default=str),
        "context": context,
    }


def take_dataset(client: MlflowClient, run_id: str, values: Values) -> None:
    """Make the dataset of ``dataset_values`` an input of the run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    names = ("name", "digest", "source_type", "source", "profile")
    dataset = Dataset(**{name: values[name] for name in names})
    tag = InputTag("mlflow.data.context", values["context"])
    client.log_inputs(run_id, [DatasetInput(dataset, [tag])])


def take_model(client: MlflowClient, run_id: str, values: Values) -> None:
    """Register a checkpoint: a LoggedModel of the run, a version that points to it, the version's aliases."""
    model = _logged_model(client, run_id, values)
    version = _version(client, run_id, model, values)
    for alias in values["aliases"].split():
        client.set_registered_model_alias(values["registered"], alias, version)


def _logged_model(client: MlflowClient, run_id: str, values: Values) -> LoggedModel:
    experiment = client.get_run(run_id).info.experiment_id
    query = f"source_run_id = '{run_id}' AND name = '{values['name']}'"
    model = next(iter(client.search_logged_models([experiment], filter_string=query)), None)
    if model is None:
        params = {key: values[key] for key in ("base", "step", "policy_version")}
        tags = {f"engram.{key}": values[key] for key in _MODEL_TAGS if key in values}
        model = client.create_logged_model(
            experiment, values["name"], run_id, tags, params, "engram-checkpoint"
        )
    if str(model.status) != "READY":
        if values["upload"] == "True":
            _upload(client, str(model.model_id), values)
        client.finalize_logged_model(model.model_id, "READY")
    return model


def _upload(client: MlflowClient, model_id: str, values: Values) -> None:
    """Copy a checkpoint's Hugging Face folder into MLflow, as a model of its flavor transformers.

    So ``mlflow.transformers.load_model("models:/NAME@best")`` answers. The weights are never loaded, and
    copied twice: in the run's folder, then to MLflow. Why the requirements are named: else MLflow would load
    the model to find them.
    """
    import mlflow.transformers

    run_dir = Path(values["folder"]).parent.parent
    with tempfile.TemporaryDirectory(prefix=".upload-", dir=run_dir) as folder:
        path, needs = str(Path(folder) / "model"), ["transformers", "torch"]
        mlflow.transformers.save_model(
            values["weights"], path, task="text-generation", pip_requirements=needs
        )
        client.log_model_artifacts(model_id, path)


def _version(client: MlflowClient, run_id: str, model: LoggedModel, values: Values) -> str:
    """Find or create the version of ``model``, and its registered model.

    Why its source is the place of the artifacts: MLflow looks up a URI models:/ID in the default store of the
    process, not in the client's.
    """
    from mlflow.exceptions import MlflowException

    name, model_id = values["registered"], str(model.model_id)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        about = "Checkpoints of Engram's runs of this name. The tags of a version say where it lies."
        client.create_registered_model(name, description=about)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get("engram.model_id") == model_id:
            return str(version.version)
    tags = {"engram.model_id": model_id, "engram.folder": values["folder"], "engram.step": values["step"]}
    new = client.create_model_version(name, model.artifact_location, run_id, tags, model_id=model_id)
    return str(new.version)
