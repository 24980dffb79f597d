"""The job commands against a fake of Ray's client; what a run does inside a job. No Ray is started."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.exceptions import AuthenticationError
from rich.console import Console

from cluster import cli
from cluster.jobs import client as client_module
from cluster.jobs.client import Endpoint, Jobs, JobsError, Submission, connect
from cluster.jobs.command import job_table, jobs_table

QUICKSTART = Path("tests/quickstart.yaml")
ENDPOINT = Endpoint("http://head:8265", "disabled", 2)


class FakeClient:
    """A cluster with one job, whose log comes in pieces."""

    def __init__(self, statuses: list[str]) -> None:
        self.statuses, self.pieces = statuses, ["train step 1/2\n", "train step 2/2\n"]
        self.submitted: dict[str, Any] = {}
        self.stops, self.silent = 0, False

    def submit_job(self, **submission: Any) -> str:
        self.submitted = submission
        return submission["submission_id"] or "raysubmit_1"

    def get_job_info(self, job_id: str) -> Any:
        if job_id != "monday":
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return details(status)

    def list_jobs(self) -> list[Any]:
        driver = details("RUNNING")
        driver.type = "DRIVER"
        return [details("SUCCEEDED"), driver]

    def get_job_logs(self, job_id: str) -> str:
        self.get_job_info(job_id)
        return "".join(self.pieces)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for piece in self.pieces:
            yield piece
        if self.silent:
            await asyncio.sleep(60)

    def stop_job(self, job_id: str) -> bool:
        self.stops += 1
        self.statuses = ["RUNNING", "STOPPED"]
        return True


def details(status: str) -> Any:
    return SimpleNamespace(
        type="SUBMISSION",
        submission_id="monday",
        job_id="02000000",
        status=status,
        entrypoint="python -m cluster train tests/quickstart.yaml rollout.schedule=[10:4]",
        message="Job finished.",
        start_time=1_000_000,
        end_time=None if status in ("PENDING", "RUNNING") else 4_661_000,
        metadata={"commit": "abc123", "mlflow_run": "f27"},
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient(["RUNNING", "SUCCEEDED"])
    monkeypatch.setattr(client_module, "connect", lambda endpoint: Jobs(fake, endpoint))
    monkeypatch.setattr(client_module, "_POLL_S", 0.01)
    return fake


def error(capsys: pytest.CaptureFixture[str], *arguments: str, status: int) -> str:
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


# --- the commands -------------------------------------------------------------------------------------------


def test_submit_sends_the_command_with_commit_grace_and_the_store(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    words = ["train", str(QUICKSTART), "output_dir=/shared/runs", "resume=auto", "name=two words"]
    assert cli.main(["submit", "--name", "monday", "--env", "HF_HOME", "--grace", "90", *words]) == 0
    sent = fake.submitted
    command = f"python -m cluster train {QUICKSTART} output_dir=/shared/runs resume=auto 'name=two words'"
    assert sent["entrypoint"] == command
    assert sent["submission_id"] == "monday" and Path(sent["runtime_env"]["working_dir"]).is_absolute()
    variables = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "HF_HOME": "/shared/hf",
        "RAY_JOB_STOP_WAIT_TIME_S": "90",
    }
    assert sent["runtime_env"]["env_vars"] == variables
    assert set(sent["metadata"]) <= {"commit"} and len(sent["metadata"].get("commit", "0" * 40)) >= 40


def test_retries_supervise_the_training_on_the_cluster_and_nothing_else(
    fake: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(QUICKSTART), "output_dir=/r"]
    assert cli.main(["submit", "--name", "monday", "--retries", "4", *words]) == 0
    assert fake.submitted["entrypoint"].endswith(f"train {QUICKSTART} output_dir=/r --supervise=4")
    refused = error(
        capsys, "submit", "--retries", "4", "evaluate", str(QUICKSTART), "output_dir=/r", status=2
    )
    assert "only train goes on by itself" in refused
    for several in (["--seeds", "0,1"], ["--sweep=train.steps=1,2"]):
        refused = error(capsys, "submit", "--retries", "4", *words, *several, status=2)
        assert f"goes with one run, without {several[0].partition('=')[0]}" in refused


def test_submit_follow_shows_the_log_and_has_the_jobs_status(
    fake: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "--name", "monday", "--follow", "train", str(QUICKSTART), "output_dir=/shared/runs"]
    assert cli.main(words) == 0
    assert "train step 1/2\ntrain step 2/2\n" in capsys.readouterr().out
    fake.statuses = ["RUNNING", "FAILED"]
    assert cli.main(words) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", str(QUICKSTART)], "output_dir=runs is relative"),
        (["train", str(QUICKSTART), "output_dir=/r", "trian.steps=1"], "did you mean train.steps"),
        (["train", "train.steps=1"], "train needs a configuration before its settings"),
        (["train", "quickstrat", "output_dir=/r"], "did you mean quickstart"),
        (["train", "/etc/x.yaml", "output_dir=/r"], "is not part of what is sent"),
        (["train", str(QUICKSTART), "output_dir=/r", "tracking.uri=sqlite:///mlflow.db"], "four slashes"),
        (["train", str(QUICKSTART), "output_dir=/r", "resume=runs/x"], "resume=runs/x is relative"),
        (["evaluate", str(QUICKSTART), "--sweep", "write.epochs=1,5"], "output_dir=runs is relative"),
    ],
)
def test_what_cannot_work_is_not_submitted(
    fake: FakeClient, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(capsys, "submit", *words, status=2)
    assert fake.submitted == {}


def test_runs_over_seeds_and_sweeps_can_be_submitted(fake: FakeClient) -> None:
    words = ["train", str(QUICKSTART), "output_dir=/r", "--seeds", "0,1", "--sweep", "write.epochs=1,2"]
    assert cli.main(["submit", "--name", "monday", *words]) == 0
    assert fake.submitted["entrypoint"].endswith("--seeds 0,1 --sweep write.epochs=1,2")


def test_a_shipped_configuration_is_that_of_the_checkout(fake: FakeClient, tmp_path: Path) -> None:
    submit = ["submit", "--name", "monday"]
    assert cli.main([*submit, "train", "quickstart", "output_dir=/r", "--print-config"]) == 0
    command = "python -m cluster train quickstart output_dir=/r --print-config"
    assert fake.submitted["entrypoint"] == command  # options behind the command are the command's
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/__main__.py").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/of_this_checkout.yaml").write_text("name: x\n")
    words = ["--working-dir", str(tmp_path), "train", "of_this_checkout", "output_dir=/r"]
    assert cli.main([*submit, *words]) == 0


def test_submit_wants_a_checkout_and_known_variables(
    fake: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", str(QUICKSTART), "output_dir=/r")
    elsewhere, unknown = ("--working-dir", str(tmp_path)), ("--env", "NOT_SET_HERE")
    assert "is no checkout of Engram" in error(capsys, "submit", *elsewhere, *train, status=2)
    assert "--env NOT_SET_HERE: is not set" in error(capsys, "submit", *unknown, *train, status=2)


def test_status_of_all_and_of_one(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs(fake, ENDPOINT).all()
    assert [job.status for job in jobs] == ["SUCCEEDED"]  # the driver that nobody submitted is left out
    text = rendered(jobs_table(jobs, ENDPOINT.address, 0.0, 200))
    for expected in ("monday", "SUCCEEDED", "1:01:01", "abc123", "f27", "rollout.schedule=[10:4]"):
        assert expected in text
    assert "1:00:00" in rendered(job_table(Jobs(FakeClient(["RUNNING"]), ENDPOINT).get("monday"), now=4600.0))
    assert cli.main(["status", "monday"]) == 0
    assert "MLflow run" in capsys.readouterr().out


def test_the_jobs_can_be_read_at_80_columns(fake: FakeClient) -> None:
    text = rendered(jobs_table(Jobs(fake, ENDPOINT).all(), ENDPOINT.address, 0.0, 80), 80)
    assert text.splitlines()[0] == f"Jobs at {ENDPOINT.address}"
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("monday SUCCEEDED", "took 1:01:01", "commit abc123", "rollout.schedule=[10:4]"):
        assert whole in text


def test_logs(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "monday"]) == 0
    assert capsys.readouterr().out == "train step 1/2\ntrain step 2/2\n"


def test_stop_waits_for_the_end(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.statuses = ["RUNNING"]
    fake.pieces.append("saved: /shared/runs/x/checkpoints/step-000002\n")
    assert cli.main(["stop", "monday"]) == 0
    said = capsys.readouterr().out
    assert "STOPPED" in said and fake.stops == 1
    assert said.endswith("\nsaved: /shared/runs/x/checkpoints/step-000002\n")
    assert cli.main(["stop", "monday"]) == 0
    assert fake.stops == 1  # it is over: nobody is asked again


def test_a_job_that_does_not_end_in_time_is_said() -> None:
    with pytest.raises(JobsError, match="job monday is still RUNNING after 0 s"):
        Jobs(FakeClient(["RUNNING"]), ENDPOINT).ended("monday", 0)


def test_following_a_silent_job_ends_when_the_job_has(fake: FakeClient) -> None:
    fake.silent, fake.statuses = True, ["RUNNING", "STOPPED"]
    written: list[str] = []
    job = asyncio.run(
        asyncio.wait_for(Jobs(fake, ENDPOINT).follow("monday", written.append, quiet_s=0.05), 10)
    )
    assert job.status == "STOPPED" and written == fake.pieces


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_an_unknown_job(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "logs", "stop"):
        assert "knows no job friday" in error(capsys, command, "friday", status=1)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConnectionError("Failed to connect"), "no Ray cluster answers at http://head:8265"),
        (requests.exceptions.ReadTimeout("slow"), "no Ray cluster answers at http://head:8265 within 2 s"),
        (AuthenticationError("no token"), "give --auth token"),
        (
            RuntimeError(
                "Request failed with status code 500: Traceback\\n  File x\\nValueError: Job monday exists."
            ),
            "ValueError: Job monday exists",
        ),
    ],
)
def test_failures_of_the_cluster_are_one_line(raised: Exception, message: str) -> None:
    class Broken(FakeClient):
        def get_job_info(self, job_id: str) -> Any:
            raise raised

    with pytest.raises(JobsError, match=message) as caught:
        Jobs(Broken(["RUNNING"]), ENDPOINT).get("monday")
    assert "\n" not in str(caught.value)


def test_a_server_that_accepts_and_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own requests have no timeout: this goes through its real client."""
    for name in ("RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "disabled")  # restored afterwards: connect sets them
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.accept, daemon=True).start()
        with pytest.raises(JobsError, match=r"no Ray cluster answers at .* within 0\.3 s"):
            connect(Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}", "disabled", 0.3))


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_without_a_token_no_cluster_is_said_to_refuse(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens there. With a token it is asked, and does not answer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "disabled")  # restored afterwards: connect sets them
    words = (command, "monday", "--auth", "token", "--deadline", "1", "--address", "http://127.0.0.1:9")
    said = error(capsys, *words, status=1)
    assert "no token is here; set RAY_AUTH_TOKEN" in said and "refuses" not in said
    (tmp_path / "token").write_text("a" * 32)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert "no Ray cluster answers at http://127.0.0.1:9" in error(capsys, *words, status=1)


def test_an_address_without_http_is_refused() -> None:
    with pytest.raises(JobsError, match="give the address of the cluster's dashboard"):
        connect(Endpoint("127.0.0.1:6379", "disabled", 1))


def test_the_submissions_of_help_are_accepted(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    assert cli.main(["submit", "--help"]) == 0
    text = capsys.readouterr().out.replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.startswith("    engram submit")]
    assert len(lines) == 4
    for _, submit, *words in lines:
        assert cli.main([submit, "--name", "monday", *words]) in (0, 1)
        assert fake.submitted["entrypoint"].startswith("python -m cluster ")
        fake.submitted = {}


def test_words_are_quoted_for_the_shell() -> None:
    submission = Submission(("train", "configs/x.yaml", "name=it's $HOME"), Path("/x"), {}, "", "", 3)
    assert submission.entrypoint == """python -m cluster train configs/x.yaml 'name=it'"'"'s $HOME'"""


def rendered(table: Any, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()
