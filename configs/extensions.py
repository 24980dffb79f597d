"""Finds the user's own parts: an object of their module, named in the configuration as
``package.module:name``.

environment.custom=my_tasks:build -> load_extension("environment.custom", "my_tasks:build") -> my_tasks.build

The module must be importable: it is installed, or lies in the folder that the run was started in, which
``ray job submit --working-dir .`` sends along. It is the user's code and runs with the user's rights, in the
driver and in every worker.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from configs.user_code import described

FORM = "package.module:name"


class ExtensionError(RuntimeError):
    """The user's own object is missing, or is not what its setting asks for. One line."""


def is_path(text: str) -> bool:
    """True if ``text`` has the form package.module:name."""
    module, colon, name = text.partition(":")
    return colon == ":" and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_extension(setting: str, path: str) -> Callable[..., Any]:
    """The callable that ``setting`` names. Raises ExtensionError, also for what its module raises."""
    if not is_path(path):
        cure = f"write {FORM}, e.g. my_tasks:build for `build` in my_tasks.py"
        raise ExtensionError(f"{setting}={path!r} is not allowed: {cure}")
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            problem = f"{module_name} imports {error.name}, which is not installed here"
        else:
            cure = "start from the folder that holds it, or install it, also on the cluster's nodes"
            problem = f"there is no module {error.name}: {cure}"
        raise ExtensionError(f"{setting}={path}: {problem}") from error
    except (Exception, SystemExit) as error:
        raise ExtensionError(f"{setting}={path}: importing {module_name}: {described(error)}") from error
    value: Callable[..., Any] | None = getattr(module, name, None)
    if callable(value):
        return value
    public = sorted(key for key, other in vars(module).items() if callable(other) and not key.startswith("_"))
    has = ", ".join(public) or "nothing"
    raise ExtensionError(
        f"{setting}={path}: {module_name} has no function or class {name}; it has {has}"[:500]
    )


def require_members(setting: str, path: str, made: object, members: tuple[str, ...], protocol: str) -> None:
    """Require that ``made``, which the user's function returned, has all of ``protocol``.

    Raises ExtensionError.
    """
    if missing := [member for member in members if not hasattr(made, member)]:
        kind = type(made).__name__
        raise ExtensionError(f"{setting}={path} returned {kind} without {', '.join(missing)}: see {protocol}")
