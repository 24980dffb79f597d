"""Checks a folder before a run needs it: a user hears in a second that nothing can be written there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from configs.bounds import ConfigError


def require_writable(folder: Path, setting: str) -> None:
    """Raise ConfigError unless a file can be written in ``folder``, which need not exist; none is left."""
    made: list[Path] = []
    try:
        for part in reversed([folder, *folder.parents]):
            if not part.exists():
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except (OSError, ValueError) as error:  # the second: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        cure = f"make room or get the right to it, or give another {setting}=FOLDER"
        raise ConfigError(f"{setting}={folder}: cannot be written ({reason}); {cure}") from None
    finally:
        for part in reversed(made):
            part.rmdir()
