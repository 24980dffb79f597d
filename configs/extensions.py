"""What a user brings of their own: an object of their module, named in the configuration as ``package.module:name``.

environment.custom=my_tasks:build   ->   load_extension("environment.custom", "my_tasks:build")   ->   my_tasks.build

The module must be importable where the run is: from the folder that it was started in (``ray job submit --working-dir .`` brings that along), or
installed. It is the user's code and runs with the user's rights, in the driver and in every worker.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

FORM = "package.module:name"


class ExtensionError(RuntimeError):
    """The user's own object is not there, or is not what its setting asks for; one line."""


def is_path(text: str) -> bool:
    """Whether ``text`` has the form of a path to an object."""
    module, colon, name = text.partition(":")
    return colon == ":" and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_extension(setting: str, path: str) -> Callable[..., Any]:
    """The callable that ``setting`` names. Raises ExtensionError; what the module itself raises when it is imported keeps its traceback."""
    if not is_path(path):
        raise ExtensionError(
            f"{setting}={path!r} is not allowed: write {FORM}, e.g. my_tasks:build for `build` in my_tasks.py"
        )
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ExtensionError(
                f"{setting}={path}: {module_name} imports {error.name}, which is not installed here"
            ) from error
        raise ExtensionError(
            f"{setting}={path}: there is no module {error.name}: start from the folder that holds it, or install it, also on the cluster's nodes"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        there = (
            ", ".join(
                sorted(
                    key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
                )
            )
            or "nothing"
        )
        raise ExtensionError(
            f"{setting}={path}: {module_name} has no function or class {name}; it has {there}"[:500]
        )
    return found  # type: ignore[no-any-return]


def require_members(setting: str, path: str, made: object, members: tuple[str, ...], protocol: str) -> None:
    """Raises ExtensionError where what the user's function returned lacks a part of ``protocol``."""
    if missing := [member for member in members if not hasattr(made, member)]:
        raise ExtensionError(
            f"{setting}={path} returned {type(made).__name__} without {', '.join(missing)}: see {protocol}"
        )
