"""Loads the user's own parts, and names the owner of a fault: their file and line, in one line.

    environment.custom=my_tasks:build -> load_extension("environment.custom", "my_tasks:build")

    with owned("the environment shop, act", TaskError):
        session.act(text)
    -> TaskError("the environment shop, act: ValueError: invalid literal ... (my_env.py:8)")

Why: a fault of the user's code fails one episode and is counted. It is no lost worker, and no traceback.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORM = "package.module:name"

_ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(f"{_ROOT / name}/" for name in ("actors", "cluster", "configs", "learner"))
_PATHS = sysconfig.get_paths()
_STANDARD = tuple(f"{_PATHS[name]}/" for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(f"{_PATHS[name]}/" for name in ("purelib", "platlib"))
_MOST_NAMES = 20  # of a module, in a message
_MOST = 500  # characters of a message: a user's exception may hold a whole page


@contextmanager
def owned(
    whom: str, kind: type[Exception], source: object = None, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what the block raises into ``kind``, see ``fault``; only ``passing`` goes through as it is."""
    try:
        yield
    except passing:
        raise
    except (Exception, SystemExit) as error:
        raise fault(whom, error, kind, source) from error


def fault(whom: str, error: BaseException, kind: type[Exception], source: object = None) -> Exception:
    """``error`` as ``kind``: ``whom`` in front, the user's file and line behind.

    An error of ``kind`` itself says what it needs: only the line is added. ``source`` is what was called, for
    a fault that only shows in our own code.
    """
    if not isinstance(error, kind):
        return kind(f"{whom}: {described(error, source)}")
    where = place(error)
    return kind(f"{error} ({where})") if where and where not in str(error) else error


def described(error: BaseException, source: object = None) -> str:
    """An exception in one line: its class, its message, and where the user's code raised it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  the user's own __str__
        message = "(its message cannot be read)"
    message = " ".join(message.encode(errors="replace").decode().split())
    if len(message) > _MOST:
        message = f"{message[:_MOST]}..."
    where = place(error, source) or place_of_last_frame(error)
    name = type(error).__name__
    return f"{name}{': ' if message else ''}{message}{f' ({where})' if where else ''}"


def place(error: BaseException | None, source: object = None) -> str:
    """ "my_env.py:8": the user's line that raised ``error``. Empty where no code of theirs was running.

    The innermost line of a file of their own; else the first line of a package that they installed; else
    where ``source`` is defined.
    """
    if isinstance(error, SyntaxError) and error.filename and _is_file(error.filename):
        return f"{_short(error.filename)}:{error.lineno}"
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__ if error else None)
    ]
    theirs = [(file, line) for file, line in frames if _is_file(file) and not file.startswith(_OURS)]
    own = [(file, line) for file, line in theirs if not file.startswith((*_STANDARD, *_INSTALLED))]
    installed = [(file, line) for file, line in theirs if file.startswith(_INSTALLED)]
    chosen = own[-1:] or installed[:1] or _definition(source)
    return f"{_short(chosen[0][0])}:{chosen[0][1]}" if chosen else ""


def place_of_last_frame(error: BaseException) -> str:
    """Where ``error`` was raised, whoever wrote that file."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return f"{_short(frames[-1][0])}:{frames[-1][1]}" if frames else ""


def _definition(source: Any) -> list[tuple[str, int]]:
    """The file and line that define a function or a method of the user's; nothing for one of ours."""
    function: Callable[..., Any] | None = getattr(source, "__func__", source)
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith((*_OURS, *_STANDARD)) or not _is_file(code.co_filename):
        return []
    return [(code.co_filename, code.co_firstlineno)]


def _is_file(name: str) -> bool:
    """Whether a frame's file name names a file: "<string>" and "<frozen importlib>" do not."""
    return not name.startswith("<")


def _short(file: str) -> str:
    """``file`` as the user knows it: relative to the folder from which it is imported."""
    roots = [str(_ROOT), str(Path.cwd()), *sys.path]
    inside = [root for root in roots if root and file.startswith(f"{root.rstrip('/')}/")]
    return file.removeprefix(f"{max(inside, key=len).rstrip('/')}/") if inside else file


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
    close = difflib.get_close_matches(name, public, n=_MOST_NAMES, cutoff=0)
    has = ", ".join(public if len(public) <= _MOST_NAMES else [*close, "and more"]) or "nothing"
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
