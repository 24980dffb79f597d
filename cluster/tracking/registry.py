"""What MLflow holds of a run beside figures and files: the data that it read, and its kept checkpoints as models with a name and aliases.

    Tracker.dataset, Tracker.model --spool--> backfill.py --> take_dataset, take_model      (may be repeated: what is there is found)

A checkpoint stays where it is: its model says in tags where that is. With tracking.models=upload its Hugging Face folder goes into the store too.
"""

from __future__ import annotations

import hashlib
import json
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


def dataset_values(environment: EnvironmentConfig, context: DataContext) -> dict[str, str]:
    """A task source as MLflow names data: its files by name and content, or where it makes its tasks up the settings that it does so by."""
    part = getattr(environment, environment.name)
    settings: dict[str, Any] = (
        asdict(part)
        if is_dataclass(part) and not isinstance(part, type)
        else {"custom": environment.custom, "options": environment.options}
    )
    files = [
        Path(value).expanduser()
        for key, value in settings.items()
        if key.endswith("path") and isinstance(value, str) and value
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in files:
        if file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    source: dict[str, Any] = (
        {"uri": str(files[0].absolute())}
        if files
        else {"tags": {"made by": f"actors.environments.{environment.name}"}}
    )
    return {
        "name": " ".join([environment.name, *(file.name for file in files)])[:500],
        "digest": digest.hexdigest()[:32],
        "source_type": "local" if files else "code",
        "source": json.dumps(source),
        "profile": json.dumps(settings, default=str),
        "context": context,
    }


def take_dataset(client: MlflowClient, run_id: str, values: Values) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    given = {key: values[key] for key in ("name", "digest", "source_type", "source", "profile")}
    client.log_inputs(
        run_id, [DatasetInput(Dataset(**given), [InputTag("mlflow.data.context", values["context"])])]
    )


def take_model(client: MlflowClient, run_id: str, values: Values) -> None:
    """A LoggedModel of the run, a version of the registered model that points to it, and the aliases on that version."""
    model = _logged_model(client, run_id, values)
    version = _version(client, run_id, model, values)
    for alias in values["aliases"].split():
        client.set_registered_model_alias(values["registered"], alias, version)


def _logged_model(client: MlflowClient, run_id: str, values: Values) -> LoggedModel:
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models(
        [experiment], filter_string=f"source_run_id = '{run_id}' AND name = '{values['name']}'"
    )
    model = found[0] if found else None
    if model is None:
        about = {key: values[key] for key in ("base", "step", "policy_version")}
        tags = {
            f"engram.{key}": values[key]
            for key in ("folder", "weights", "host", "held_out_f1")
            if key in values
        }
        model = client.create_logged_model(
            experiment, values["name"], run_id, tags, about, "engram-checkpoint"
        )
    if str(model.status) != "READY":
        if values["upload"] == "True":
            client.log_model_artifacts(model.model_id, values["weights"])
        client.finalize_logged_model(model.model_id, "READY")
    return model


def _version(client: MlflowClient, run_id: str, model: LoggedModel, values: Values) -> str:
    """Its source is where the model's artifacts would be: a URI models:/ID is looked up in the process's default store, not in the client's."""
    from mlflow.exceptions import MlflowException

    name, model_id = values["registered"], str(model.model_id)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(
            name, description="Checkpoints of Engram's runs of this name; a version's tags say where it lies."
        )
    held = [
        version
        for version in client.search_model_versions(f"name = '{name}'")
        if version.tags.get("engram.model_id") == model_id
    ]
    if held:
        return str(held[0].version)
    tags = {"engram.model_id": model_id, "engram.folder": values["folder"], "engram.step": values["step"]}
    return str(
        client.create_model_version(name, model.artifact_location, run_id, tags, model_id=model_id).version
    )
