"""Checks a folder before a run needs it: a user hears in a second that nothing can be written there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from configs.bounds import ConfigError


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
