"""A Ray cluster with a token, and two jobs by the same submission.

test_ray_job.py runs this file as the first process of its own namespaces.

job_story.py FOLDER MODEL  -->  FOLDER/story.json; every process ends with this one
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

PYTHON = Path(sys.executable)
ROOT = Path(__file__).parents[2]
STEPS = 4
SETTINGS = (
    f"train.steps={STEPS}",
    "train.tasks_per_step=2",
    "train.group_size=2",
    "train.checkpoint_every=1",
    "warm_start.steps=0",
    "evaluation.tasks=1",
    "evaluation.memory_off_row=false",
    "evaluation.bootstrap_samples=100",
    "memory.policy=raw",
    "sampling.max_answer_tokens=4",
    "learner.trainable_layers=3",
    "learner.threads=1",
    "learner.resource=learner",
    "rollout.threads=1",
    "rollout.resource=rollout",
    "engine.slots=2",
    "engine.kv_cache_gib=0.2",
    "resume=auto",
)


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    loopback_up()
    prepare_environment(folder)
    command = [
        "train",
        "quickstart",
        *SETTINGS,
        f"model.name={model}",
        f"output_dir={folder}/runs",
    ]
    story: dict[str, object] = {}
    try:
        start_ray()
        submit_plainly(command)
        story["refused"] = without_token()
        story["left"] = wait_for_checkpoint(folder / "runs").name
        story["stop"] = cluster_command("stop", "first")
        story["first_log"] = cluster_command("logs", "first")
        story["second"] = cluster_command("submit", "--name", "second", "--follow", *command)
        story["status"] = cluster_command("status", "second")
        story["all"] = cluster_command("status")
        story["unknown"] = cluster_command("logs", "third")
    finally:
        (folder / "story.json").write_text(json.dumps(story, indent=1))


def loopback_up() -> None:
    """Switch the loopback of the new network namespace on, without the program `ip`.

    0x8914 is SIOCSIFFLAGS, with the flags IFF_UP and IFF_RUNNING.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, b""))


def prepare_environment(folder: Path) -> None:
    os.chdir(ROOT)
    os.environ["PATH"] = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-this-test-alone-0123456789abcdef",
        "COLUMNS": "200",
    }
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/elsewhere.db"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)


def start_ray() -> None:
    command = [
        "ray",
        "start",
        "--head",
        "--num-cpus=3",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
    ]
    resources = [
        "--object-store-memory=200000000",
        '--resources={"rollout": 1, "learner": 1}',
        f"--temp-dir={os.environ['RAY_STORY_TEMP']}",
    ]
    for _ in range(3):  # Ray gives its own processes 30 s to come up, which a busy machine exceeds
        done = subprocess.run([*command, *resources], capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            return
        # This stops the Ray of this namespace, which sees no other process.
        subprocess.run(["ray", "stop", "--force"], capture_output=True, timeout=120)
    raise SystemExit(f"ray start failed three times: {done.stdout}{done.stderr}")


def submit_plainly(command: list[str]) -> None:
    """Ray's own command, as the README has it."""
    environment = {
        "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"],
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
    }
    options = [
        "--address",
        "http://127.0.0.1:8265",
        "--working-dir",
        ".",
        "--submission-id",
        "first",
        "--no-wait",
    ]
    more = [
        "--runtime-env-json",
        json.dumps({"env_vars": environment}),
        "--metadata-json",
        '{"commit": "0123456789"}',
    ]
    subprocess.run(
        ["ray", "job", "submit", *options, *more, "--", "python", "-m", "cluster", *command],
        capture_output=True,
        timeout=120,
        check=True,
    )


def without_token() -> list[object]:
    command = [PYTHON, "-m", "cluster", "status", "--auth", "disabled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return [done.returncode, done.stdout, done.stderr]


def wait_for_checkpoint(runs: Path) -> Path:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        if found := list(runs.glob("*/checkpoints/step-*/state.json")):
            return found[0].parent
        time.sleep(0.1)
    raise SystemExit(f"no checkpoint within 600 s; the log:\n{cluster_command('logs', 'first')}")


def cluster_command(*arguments: str) -> list[object]:
    """Run ``engram`` in this process, which has imported Ray already. Returns exit status, stdout, stderr."""
    from cluster.cli import main as cluster

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = cluster(arguments)
    return [status, out.getvalue(), errors.getvalue()]


if __name__ == "__main__":
    main()
