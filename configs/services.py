"""Settings of what stands around a run: model endpoints, kept episodes, MLflow, stores, Ray, assistant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from configs.bounds import HIDDEN, home_expanded, not_negative, positive, require
from configs.store_url import is_url


@dataclass(frozen=True)
class EndpointConfig:
    """An LLM behind an OpenAI-compatible endpoint.

    Its key is read from the environment variable ``api_key_env``, and never logged.
    """

    url: str = ""  # e.g. http://127.0.0.1:8000/v1
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"  # empty: no key is sent
    timeout_s: float = 60.0  # of one request; an answer takes at most (retries + 1) times as long
    retries: int = 3
    max_concurrent: int = 8  # requests at once, of each process
    cache_dir: str = ""  # answers are kept here and asked for once; empty: no cache
    usd_per_million_prompt_tokens: float = 0.0  # for the cost column
    usd_per_million_generated_tokens: float = 0.0

    def __post_init__(self) -> None:
        home_expanded(self, "cache_dir")
        positive(self, "timeout_s", "max_concurrent")
        not_negative(self, "retries", "usd_per_million_prompt_tokens", "usd_per_million_generated_tokens")
        # Settings are saved and logged. A key among them is refused, and not shown.
        is_name = re.fullmatch(r"[A-Za-z_]\w*|", self.api_key_env, re.ASCII) is not None
        bound, cure = "the name of an environment variable, or empty", "the key itself is no setting"
        require(is_name, "api_key_env", HIDDEN, bound, cure)
        require_no_secret("url", self.url, "name the key's variable in api_key_env")


def without_secret(url: str) -> bool:
    """Whether an address has no user, no password and no query, which may hold a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return True  # no address at all: whoever opens it says so
    return "@" not in parts.netloc and not parts.query


def has_password(address: str) -> bool:
    """Whether a server's or a database's address holds a password. A user alone is none, but for http."""
    try:
        parts = urlsplit(address)
        named = parts.password is not None or (parts.scheme in ("http", "https") and "@" in parts.netloc)
    except ValueError:
        return False
    return named or re.search(r"(?:^|&)(?:password|token|api_key)=", parts.query, re.IGNORECASE) is not None


def require_no_secret(key: str, url: str, cure: str) -> None:
    """Refuse an address that may hold a key, without showing it: settings are saved and logged."""
    require(without_secret(url), key, HIDDEN, "an address without user, password and query", cure)


@dataclass(frozen=True)
class EpisodesConfig:
    """Which episodes a run keeps for ``engram inspect``: one file each, in the run's folder."""

    per_step: int = 1  # of the episodes that a training step learned from: siblings of a task, drawn by lot
    per_evaluation: int = 2  # of each held-out evaluation: its first tasks, the same in every row
    failed: int = 100  # of a run; later failures are only counted
    keep: int = 10_000  # files of training episodes: the oldest are deleted beyond it; 0: all are kept
    traces: bool = True  # the same episodes as MLflow traces of the run

    def __post_init__(self) -> None:
        not_negative(self, "per_step", "per_evaluation", "failed", "keep")


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run reports: MLflow, and wandb or trackio where they are installed.

    An empty ``uri`` means MLFLOW_TRACKING_URI, and without this variable sqlite in the output folder.
    """

    enabled: bool = True
    # wandb and trackio are extras; their keys and addresses are variables of theirs, such as WANDB_API_KEY
    trackers: tuple[Literal["mlflow", "wandb", "trackio"], ...] = ("mlflow",)
    uri: str = ""  # of MLflow
    experiment: str = "engram"  # MLflow's; the project of wandb and trackio
    timeout_s: float = 20.0  # of one request to a server
    # how long the end of a run waits for a store that is away; what was not sent stays in the run's folder
    finish_timeout_s: float = 30.0
    # between measurements of the driver's machine (processor, memory, disk, network, GPUs); 0: never
    system_metrics_s: float = 10.0
    # kept checkpoints become registered models: as references to their folders, or with all their files
    models: Literal["reference", "upload", "off"] = "reference"

    def __post_init__(self) -> None:
        home_expanded(self, "uri")
        cure = "set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, instead"
        require(not has_password(self.uri), "uri", HIDDEN, "an address without a password", cure)
        positive(self, "timeout_s")
        not_negative(self, "finish_timeout_s", "system_metrics_s")
        cure = "tracking.enabled=false turns tracking off"
        require(bool(self.trackers), "trackers", self.trackers, "one or more of mlflow, wandb, trackio", cure)

    @property
    def uses_mlflow(self) -> bool:
        return self.enabled and "mlflow" in self.trackers


@dataclass(frozen=True)
class StoreConfig:
    """Where ``output_dir`` is the address of a store (s3://, gs://, file://): how runs work with it.

    A run works in a local folder. Each file that is whole there is put into the store, in the background.
    Credentials come from the environment (AWS_ACCESS_KEY_ID and its like), never from settings.
    """

    # the local folder of the runs; with several machines one that all of them see. Empty: in ENGRAM_CACHE, or
    # else ~/.cache/engram
    work_dir: str = ""
    # without a byte from the store, until a request is given up and tried again (gs://: two minutes at least)
    timeout_s: float = 30.0
    # how long the end of a run waits for the store; what is not there by then stays in the local folder
    finish_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        home_expanded(self, "work_dir")
        positive(self, "timeout_s")
        not_negative(self, "finish_timeout_s")
        require(not is_url(self.work_dir), "work_dir", self.work_dir, "a folder of this machine")


@dataclass(frozen=True)
class RayConfig:
    """Ray. An empty ``address`` starts a local Ray for this run, also where a cluster runs on the machine.

    ``auto`` or an address joins a cluster. In a Ray job the default is ``auto``.
    """

    address: str = ""
    # of a local Ray; null: what two versions of the weights and the waiting episodes need, at least 2
    object_store_gib: float | None = None
    startup_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        positive(self, "startup_timeout_s")
        if self.object_store_gib is not None:
            positive(self, "object_store_gib")


@dataclass(frozen=True)
class AssistantConfig:
    """The commands ``chat`` and ``serve``. A conversation is one long episode and has its own memory.

    ``memory`` bounds its context and flashcards, ``sampling`` its replies.
    """

    # empty: the prompt of the environment in this configuration, under which a checkpoint was trained
    system_prompt: str = ""
    temperature: float = 0.0  # 0: greedy
    # that serve keeps in memory; one more puts away the conversation that was idle longest
    max_conversations: int = 64
    idle_s: float = 3600.0  # a conversation that was idle for so long is put away too
    # serve saves each conversation here after every turn, and loads it when it is named again; empty: a
    # conversation that is put away is forgotten
    save_dir: str = ""
    max_saved: int = 1000  # conversations in save_dir; a new one is refused where it is full
    max_saved_mib: float = 4096.0  # of all files in save_dir; a new conversation is refused where it is full
    max_body_kib: int = 256  # of one request to serve
    request_timeout_s: float = 300.0  # of one request to serve, with the wait for its turn
    # what serve does with a resent history that is not what was said: return (go back to where it still was,
    # with the fast weights of that time, and answer from there) or refuse (409; without a name: begin anew)
    edited_history: Literal["return", "refuse"] = "return"
    # names by which clients may call serve, besides addresses, localhost and this machine's own name
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        not_negative(self, "temperature")
        home_expanded(self, "save_dir")
        positive(self, "max_conversations", "idle_s", "max_body_kib", "request_timeout_s")
        positive(self, "max_saved", "max_saved_mib")
