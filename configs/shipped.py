"""The YAML files that come with Engram, by name: ``quickstart`` is the installed configs/quickstart.yaml.

CONFIG of a command    quickstart | a path     -->  find_config  -->  the file
"""

from __future__ import annotations

import difflib
from pathlib import Path

from configs.bounds import ConfigError

FOLDER = Path(__file__).parent


def shipped(kind: str = "") -> dict[str, Path]:
    """The files of ``kind`` by name: "" (configurations of a run), "rows", "benchmarks" or "studies"."""
    return {path.stem: path for path in sorted((FOLDER / kind).glob("*.yaml"))}


def find_config(text: str) -> Path:
    """The file that a command's CONFIG means: a shipped one by name, or a path. Raises ConfigError."""
    if text in shipped():
        return shipped()[text]
    path = Path(text).expanduser()
    if path.exists():
        return path
    raise ConfigError(f"{text}: no such file{hint(path.stem)}")


def hint(name: str) -> str:
    """The shipped configurations for a message, and the one that ``name`` resembles."""
    close = difflib.get_close_matches(name, shipped(), n=1)
    guess = f"; did you mean {close[0]}" if close else ""
    return f"{guess}; shipped are {', '.join(shipped())}"
