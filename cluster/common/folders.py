"""Names the folder that runs work in, and checks it before a run needs it: a user hears in a second that
nothing can be written there. Processes that share it take turns: to name a run, to make MLflow's store.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from cluster.common.errors import InUseError
from configs.bounds import ConfigError
from configs.embedded import cache_folder
from configs.files import make_folder
from configs.schema import RunConfig
from configs.store_url import is_url

LONGEST_S = 300.0
_PAUSE_S = 0.05


def output_folder(config: RunConfig) -> Path:
    """The folder in which the runs of ``config`` work: ``output_dir``, or a local one beside a store."""
    if not is_url(config.output_dir):
        return Path(config.output_dir).expanduser().absolute()
    return Path(config.store.work_dir or cache_of("runs", config.output_dir)).expanduser().absolute()


def cache_of(purpose: str, url: str) -> Path:
    """The folder of the cache for what lies at ``url``: s3://bucket/a has CACHE/<purpose>/s3/bucket/a."""
    parts = urlsplit(url)
    folder = cache_folder() / purpose / parts.scheme / f"{parts.netloc}{parts.path}".strip("/")
    if parts.query:  # a bucket of this name at another endpoint
        folder = folder.with_name(f"{folder.name}@{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}")
    return folder


def require_writable(folder: Path, setting: str) -> None:
    """Raise ConfigError unless a file can be written in ``folder``, which need not exist; none is left."""
    try:
        existing = next(part for part in (folder, *folder.parents) if part.exists())
        # In a folder of its own: another process may begin in ``folder`` at the same time.
        with tempfile.TemporaryDirectory(dir=existing) as trial:
            inner = Path(trial) / folder.relative_to(existing)
            inner.mkdir(parents=True, exist_ok=True)
            (inner / "x").write_bytes(b"x")
    except (OSError, ValueError) as error:  # the second: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        cure = f"make room or get the right to it, or give another {setting}=FOLDER"
        raise ConfigError(f"{setting}={folder}: cannot be written ({reason}); {cure}") from None


@contextmanager
def in_turn(folder: Path, longest_s: float = LONGEST_S) -> Iterator[None]:
    """Hold the lock of ``folder``, which is created, for the block.

    The lock is the kernel's (flock on <folder>/.lock): it ends with its process, however that ends. Raises
    OSError, and InUseError where another process holds it for ``longest_s``.
    """
    make_folder(folder)
    lock = folder / ".lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + longest_s
    try:
        while not _taken(handle):
            if time.monotonic() > deadline:
                raise InUseError(f"{lock}: another process has held it for {longest_s:g} s: end that process")
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
