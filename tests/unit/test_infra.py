"""The files of infra/: checked against strict schemas, by Ray's own checks, and against what the code asks
Ray for.

Nothing is deployed.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from mlflow.cli import server
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from cluster.fleet.ray_runtime import demand
from configs.load import load_config
from configs.schema import LearnerConfig, RolloutConfig
from configs.shipped import shipped

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SCHEMAS = ROOT / "tests" / "data" / "infra"


def read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((INFRA / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def check(content: dict[str, Any], schema: str) -> None:
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / schema).read_text(encoding="utf-8"))).validate(
        content
    )


def settings_in(text: str) -> tuple[Path, list[str]]:
    """The configuration and the settings of the ``train`` command in ``text``."""
    config, *settings = shlex.split(re.sub(r"\\\n#?\s*", " ", text).split(" train ", 1)[1].split("\n", 1)[0])
    return shipped().get(config, ROOT / config), settings


# --- Kubernetes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kubernetes/raycluster.yaml", "kubernetes/rayjob.yaml"])
def test_the_manifests_have_no_unknown_field(name: str) -> None:
    check(read(name), "kuberay.schema.json")


def test_the_schema_refuses_what_kuberay_would_drop_silently() -> None:
    for path, key in (
        ([], "specs"),
        (["spec"], "autoscalingOptions"),
        (["spec", "workerGroupSpecs", 0], "rayStartParam"),
    ):
        broken = copy.deepcopy(read("kubernetes/raycluster.yaml"))
        inner: Any = broken
        for step in path:
            inner = inner[step]
        inner[key] = {}
        with pytest.raises(jsonschema.ValidationError):
            check(broken, "kuberay.schema.json")


def test_job_and_cluster_have_the_same_cluster() -> None:
    job, cluster = read("kubernetes/rayjob.yaml"), read("kubernetes/raycluster.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_images_and_manifests_name_the_ray_of_the_lock() -> None:
    assert read("kubernetes/raycluster.yaml")["spec"]["rayVersion"] == version("ray")


def test_every_pod_has_memory_for_the_object_store_and_the_shared_folder() -> None:
    spec = read("kubernetes/raycluster.yaml")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]


def test_the_job_asks_for_what_the_groups_of_its_cluster_have() -> None:
    """As KubeRay's autoscaler reads the manifest: Ray's own code for that."""
    job = read("kubernetes/rayjob.yaml")["spec"]
    config = load_config(*settings_in(job["entrypoint"]))
    manifest = {"metadata": {"name": "x", "namespace": "y"}, "spec": job["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    rollout, learner = types["rollout"], types["learner"]
    assert fits(config.rollout, 1, rollout["resources"])
    assert config.rollout.workers <= rollout["max_workers"] and rollout["min_workers"] == 0
    assert fits(config.learner, config.learner.workers, learner["resources"])
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert dict(demand(config, learner=True).custom) == {"learner": 4, "rollout": 4}
    assert Path(config.output_dir).is_absolute() and config.resume == "auto"


def fits(part: RolloutConfig | LearnerConfig, count: int, node: dict[str, float]) -> bool:
    """True if ``count`` workers of ``part`` fit on the node."""
    cpus, gpus, custom = count * part.cpus_per_worker, count * part.gpus_per_worker, part.resource
    return custom != "" and node["CPU"] >= cpus and node["GPU"] >= gpus and node[custom] >= count


# --- ray up -------------------------------------------------------------------------------------------------


def test_ray_up_is_valid_for_ray_itself() -> None:
    validate_config(prepare_config(copy.deepcopy(read("ray-up.yaml"))))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**read("ray-up.yaml"), "worker_nodes_types": {}}))


def test_ray_up_has_nodes_for_the_command_in_its_head() -> None:
    types = read("ray-up.yaml")["available_node_types"]
    config = load_config(*settings_in((INFRA / "ray-up.yaml").read_text(encoding="utf-8")))
    assert fits(config.rollout, 1, types["rollout"]["resources"])
    without_cpus = replace(config.learner, cpus_per_worker=0.0)
    assert fits(without_cpus, config.learner.workers, types["learner"]["resources"])
    assert types["rollout"]["max_workers"] >= config.rollout.workers


# --- compose, images ----------------------------------------------------------------------------------------


def test_compose_has_no_unknown_field_and_publishes_on_loopback_only() -> None:
    compose = read("compose.yaml")
    check(compose, "compose.schema.json")
    mounted = {
        volume.partition(":")[0] for service in compose["services"].values() for volume in service["volumes"]
    }
    assert mounted == set(compose["volumes"])
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(compose["services"])


def test_compose_gives_every_ray_node_the_same_token_and_no_default() -> None:
    services = read("compose.yaml")["services"]
    for name in ("head", "rollout"):
        environment = services[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_compose_has_nodes_for_the_command_in_its_head() -> None:
    config = load_config(*settings_in((INFRA / "compose.yaml").read_text(encoding="utf-8")))
    services = read("compose.yaml")["services"]
    given = {
        name: json.loads(services[name]["command"][-1].removeprefix("--resources="))
        for name in ("head", "rollout")
    }
    assert given == {
        "head": {config.learner.resource: config.learner.workers},
        "rollout": {config.rollout.resource: 1},
    }
    assert config.output_dir in {volume.partition(":")[2] for volume in services["head"]["volumes"]}


def test_the_servers_options_of_compose_exist() -> None:
    """In the versions of the lock: options come and go."""
    services = read("compose.yaml")["services"]
    assert unknown_options(start, [*services["head"]["command"], *services["rollout"]["command"]]) == []
    assert unknown_options(server, services["mlflow"]["command"]) == []


def unknown_options(command: Any, words: list[str]) -> list[str]:
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


def test_the_images_copy_what_is_there_and_install_from_the_locks() -> None:
    lines = [line for line in joined(INFRA / "Dockerfile") if not line.startswith("#")]
    known = {"FROM", "RUN", "ENV", "WORKDIR", "USER", "COPY"}
    assert {line.split()[0] for line in lines} == known
    stages = [line.split() for line in lines if line.startswith("FROM")]
    assert [stage[3] for stage in stages] == ["base", "cpu", "gpu"] and [
        stage[1] for stage in stages[1:]
    ] == ["base", "base"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", stages[0][1])
    sources = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    let_in = {
        line[1:]
        for line in (INFRA / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
        if line.startswith("!")
    }
    assert let_in == set(sources)
    setups = [line for line in lines if "make setup" in line]
    assert [re.search(r"VARIANT=(\w+)", line)[1] for line in setups] == ["cpu", "gpu"]  # type: ignore[index]
    assert [line for line in lines if line.startswith("USER")] == ["USER engram"]


def joined(path: Path) -> list[str]:
    """The instructions of a Dockerfile, continuation lines joined."""
    return [
        line for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines() if line.strip()
    ]


# --- Slurm --------------------------------------------------------------------------------------------------


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", INFRA / "slurm.sh"], check=True, timeout=30)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a configuration"),
        (["configs/node_8gpu.yaml", "output_dir=runs"], "give an absolute output_dir"),
    ],
)
def test_the_slurm_script_refuses_in_one_line(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        ["bash", INFRA / "slurm.sh", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of an allocation of two nodes.

    Stand-ins for Slurm's two commands and for ray print their arguments.
    """
    requeue = 'echo "scontrol $*"; exit "${FAKE_REQUEUE:-0}"'
    write(tmp_path / "scontrol", f"if [ $1 = requeue ]; then {requeue}; fi; printf 'node-a\\nnode-b\\n'")
    write(tmp_path / "srun", 'while [ "$1" != ray ]; do echo "srun $1"; shift; done; exec "$@"')
    shown = (
        'echo "mode $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"; while [ "$1" != -- ]; do echo "ray $1"; shift; done'
    )
    write(tmp_path / "venv/bin/ray", f'{shown}; shift; exec "$@"')
    allocation = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **allocation, "PATH": path, "ENGRAM_VENV": str(tmp_path / "venv")}


TRAINING = ("bash", str(INFRA / "slurm.sh"), "configs/node_8gpu.yaml", "output_dir=/shared/runs")


def test_the_slurm_script_starts_the_training_under_symmetric_run(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path / "venv/bin/python", 'echo "python $*"; exit 7')
    done = subprocess.run(TRAINING, env=slurm, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 7, done.stderr  # the training's own
    assert (
        "python -m cluster train configs/node_8gpu.yaml output_dir=/shared/runs ray.address=auto resume=auto"
        " --supervise=3" in lines
    )
    assert "mode token 64" in lines and "ray node-a:20042" in lines and "srun --ntasks=2" in lines
    assert list(tmp_path.glob(".engram-*")) == []


@pytest.mark.parametrize(
    ("sent", "status", "surroundings", "said", "ends"),
    [
        (signal.SIGUSR1, 130, {}, ["saved", "scontrol requeue 42", "saved at the time limit: job 42 is"], 0),
        (signal.SIGUSR1, 0, {}, ["saved"], 0),  # the last step was made: it is done
        (signal.SIGUSR1, 1, {}, ["saved"], 1),
        (signal.SIGTERM, 130, {}, ["saved"], 130),  # scancel
        (signal.SIGUSR1, 130, {"SLURM_RESTART_COUNT": "50"}, ["saved", "error: at the time limit"], 130),
        (signal.SIGUSR1, 130, {"FAKE_REQUEUE": "1"}, ["saved", "scontrol", "error: saved at the"], 130),
    ],
    ids=["requeued", "done", "failed", "cancelled", "too often", "refused"],
)
def test_at_the_time_limit_the_slurm_job_saves_and_requeues_itself(
    slurm: dict[str, str],
    tmp_path: Path,
    sent: signal.Signals,
    status: int,
    surroundings: dict[str, str],
    said: list[str],
    ends: int,
) -> None:
    write(
        tmp_path / "venv/bin/python",
        f"trap 'echo saved; exit {status}' TERM; echo trains; while :; do sleep 0.05; done",
    )
    piped: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(TRAINING, env=slurm | surroundings, **piped) as batch:
        assert batch.stdout is not None
        while "trains" not in batch.stdout.readline():
            assert batch.poll() is None
        batch.send_signal(sent)  # what Slurm sends to the batch script
        lines = batch.communicate(timeout=30)[0].splitlines()
    assert len(lines) == len(said) and all(map(str.startswith, lines, said)), lines
    assert batch.returncode == ends


def write(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
