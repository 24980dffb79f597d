"""wandb and trackio, beside MLflow or instead of it: ``tracking.trackers=[mlflow,wandb]``.

    Tracker's verbs --> Relay --> MLflow's tracker
                              --> wandb's or trackio's own client, which queues and sends on its threads

Both packages are extras. Keys and addresses are read from the environment by the packages themselves
(WANDB_API_KEY, WANDB_MODE, TRACKIO_SPACE_ID, ...): no setting holds one. Checked on wandb 0.31 and trackio
0.43.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import util
from pathlib import Path
from typing import Protocol

from cluster.common.errors import TrackingError
from cluster.tracking.sender import first_line
from configs.files import write_text
from configs.hub import unreachable
from configs.schema import TrackingConfig

OTHERS = ("wandb", "trackio")
_WANDB_ID = "wandb-id"  # in the folder of a run: a resumed run is the same one at wandb
_WITHOUT = "leave it out of tracking.trackers"


class Sink(Protocol):
    """One run of another tracker. Its verbs may raise anything."""

    name: str
    location: str

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def file(self, path: Path) -> None: ...

    def note(self, name: str, value: str) -> None:
        """Say a fact of the run: which data it reads, where its checkpoint lies."""
        ...

    def end(self, failed: bool, wait_s: float) -> None:
        """End the run, in about ``wait_s`` seconds; wandb keeps the timeout that it began with."""
        ...


def require_others(tracking: TrackingConfig) -> None:
    """Raise TrackingError for what would keep wandb or trackio from starting. It takes seconds at most."""
    for name in _wanted(tracking):
        found = util.find_spec(name)
        if found is None or found.origin is None:  # without origin: a folder ./wandb, as wandb itself makes
            cure = f"pip install 'engram-rl[{name}]', or {_WITHOUT}"
            raise TrackingError(f"tracking.trackers: the package {name} is not installed: {cure}")
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
            _require_wandb_server()


def open_others(tracking: TrackingConfig, folder: Path, params: Mapping[str, str]) -> list[Sink]:
    """Open the run of ``folder`` in each tracker that is wanted beside MLflow. Raises TrackingError."""
    sinks: list[Sink] = []
    for name in _wanted(tracking):
        try:
            kind = WandbRun if name == "wandb" else TrackioRun
            sinks.append(kind(tracking, folder, params))
        except Exception as error:
            for sink in sinks:
                sink.end(failed=True, wait_s=tracking.finish_timeout_s)
            raise TrackingError(f"cannot use {name}: {first_line(error)}; mend it, or {_WITHOUT}") from error
    return sinks


class WandbRun:
    """A run at wandb, or with WANDB_MODE=offline in the run's folder."""

    name = "wandb"

    def __init__(self, tracking: TrackingConfig, folder: Path, params: Mapping[str, str]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        known = folder / _WANDB_ID
        if not known.exists():
            write_text(known, secrets.token_hex(6))
        settings = wandb.Settings(
            silent=True,
            console="off",
            # Neither source nor command line: its words may hold what no setting may, such as a password.
            x_disable_meta=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=tracking.system_metrics_s == 0,
            init_timeout=tracking.timeout_s,
            finish_timeout=max(tracking.finish_timeout_s, 0.1),  # 0 would wait for ever
        )
        self._run = wandb.init(
            project=tracking.experiment,
            name=folder.name,
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            reinit="create_new",
            dir=str(folder),
            config=dict(params),
            settings=settings,
        )
        # As x axis: wandb's own step may not go back, and a resumed run goes back to its checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.location = self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def file(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def note(self, name: str, value: str) -> None:
        self._run.summary[name] = value

    def end(self, failed: bool, wait_s: float) -> None:
        self._run.finish(exit_code=int(failed))


class TrackioRun:
    """A run in trackio's folder, or in the Space that its own variables name. It takes figures and params."""

    name = "trackio"

    def __init__(self, tracking: TrackingConfig, folder: Path, params: Mapping[str, str]) -> None:
        import trackio

        with redirect_stdout(sys.stderr):  # it prints what it does
            self._run = trackio.init(
                project=tracking.experiment,
                name=folder.name,
                config=dict(params),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.location = f"trackio show --project {tracking.experiment}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def file(self, path: Path) -> None:
        """Nothing: trackio keeps files of projects, not of runs."""

    def note(self, name: str, value: str) -> None:
        """Nothing: a run's facts are given when it is opened."""

    def end(self, failed: bool, wait_s: float) -> None:
        with redirect_stdout(sys.stderr):
            # It has no deadline of its own where a Space does not answer.
            ending = threading.Thread(target=self._run.finish, name="trackio", daemon=True)
            ending.start()
            ending.join(max(wait_s, 1.0))


def _wanted(tracking: TrackingConfig) -> list[str]:
    return [name for name in OTHERS if tracking.enabled and name in tracking.trackers]


def _require_wandb_server() -> None:
    import wandb

    offline = "WANDB_MODE=offline keeps its figures in the run's folder"
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if reason := unreachable(address):
        raise TrackingError(f"cannot use wandb at {first_line(ValueError(address))}: {reason}; {offline}")
    if not wandb.login(prompt=False, verify=False):
        raise TrackingError(f"wandb has no key: set WANDB_API_KEY, or {offline}")
