"""A process inside a Ray job: what it knows, joins and refuses."""

from __future__ import annotations

import json

import pytest

from cluster.common.ray_job import JOIN, current_job, job_overrides, require_lasting
from configs.load import ConfigError, load_config
from tests.unit.test_jobs import QUICKSTART, error

IN_JOB = {
    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(
        {"runtime_env": {}, "metadata": {"job_submission_id": "monday", "commit": "abc123"}}
    )
}


def test_a_process_knows_its_job() -> None:
    job = current_job(IN_JOB)
    assert job is not None and (job.submission_id, job.commit) == ("monday", "abc123")
    for other in (
        {},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{"},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {}}'},
    ):
        assert current_job(other) is None


def test_a_job_joins_its_cluster_and_others_do_not() -> None:
    given = ["output_dir=/shared/runs", "resume=auto"]
    assert job_overrides(QUICKSTART, given, {}) == given
    inside = job_overrides(QUICKSTART, given, IN_JOB)
    assert inside == [JOIN, *given]
    assert load_config(QUICKSTART, inside).ray.address == "auto"
    chosen = job_overrides(QUICKSTART, ["output_dir=/r", "ray.address=10.0.0.1:6379"], IN_JOB)
    assert load_config(QUICKSTART, chosen).ray.address == "10.0.0.1:6379"
    with_checkpoint = job_overrides(QUICKSTART, ["output_dir=/r", "checkpoint=/r/x"], IN_JOB)
    assert with_checkpoint[-1] == "checkpoint=/r/x"  # evaluate takes it, and it is no setting


def test_in_a_job_outputs_that_would_vanish_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", IN_JOB["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    for command in ("train", "evaluate", "probe"):
        message = error(capsys, command, str(QUICKSTART), status=2)
        assert (
            "output_dir=runs is relative, and a Ray job runs in a temporary copy" in message
            and "give output_dir=/shared/runs" in message
        )
    with pytest.raises(ConfigError, match="resume=runs/x is relative"):
        job_overrides(QUICKSTART, ["output_dir=/r", "resume=runs/x"], IN_JOB)


@pytest.mark.parametrize(
    ("uri", "lasts"),
    [
        ("", True),  # below output_dir
        ("http://mlflow:5000", True),
        ("postgresql://mlflow@db/mlflow", True),
        ("databricks", True),
        ("sqlite:////shared/mlflow.db", True),
        ("sqlite:///mlflow.db", False),
        ("file:///shared/mlruns", True),
        ("file:mlruns", False),
        ("mlruns", False),
    ],
)
def test_a_store_that_would_vanish_is_refused(uri: str, lasts: bool) -> None:
    for settings, environ in (([f"tracking.uri={uri}"], {}), ([], {"MLFLOW_TRACKING_URI": uri})):
        config = load_config(QUICKSTART, ["output_dir=/shared/runs", *settings])
        if lasts:
            require_lasting(config, environ)
        else:
            with pytest.raises(ConfigError, match=r"(tracking\.uri|MLFLOW_TRACKING_URI)=.* is relative"):
                require_lasting(config, environ)
        require_lasting(
            load_config(QUICKSTART, ["output_dir=/r", "tracking.enabled=false", *settings]), environ
        )
