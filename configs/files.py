"""Writes files that are whole or absent, and reads JSON that has the expected shape. Every floor uses it.

write_text     aside --> fsync --> rename      a reader sees the old file or the new one, never a part
new_folder     the same for a folder of files, which may replace an earlier one
remove_folder  a reader sees the folder or none, never a part
write_digests  a line a file in <folder>/SHA256SUMS, as ``sha256sum --check`` reads it: what a disk or a copy
               changes is found, also where no size differs
read_json      bytes --> pydantic --> a frozen dataclass, or one line: file, place, what is wrong
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

DIGESTS = "SHA256SUMS"
_THREADS = 4  # hashlib releases the interpreter's lock; a disk is read faster by a few
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")

T = TypeVar("T")
Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that may be NaN. JSON has no NaN: ``dump_json`` writes null, and ``read_json`` reads it as NaN."""

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}  # building one takes milliseconds


class FileError(ValueError):
    """A file cannot be read, or does not hold what it should. One line: file, place, what is wrong."""


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` (UTF-8). A crash leaves the old text or the new one. Raises OSError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As ``write_text``, for bytes."""
    partial = _aside(path, "partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Fill a folder beside ``target``; a good end gives it that name, a failure removes it.

    ``target`` must not exist, or be empty. With ``replace`` an earlier folder keeps its name until the new
    one is on the disk; a process that is killed between the two renames leaves it to ``recover_folder``.
    Raises OSError, as ``require_replaceable`` does before anything else.
    """
    target = _real(target)
    require_replaceable(target)
    partial, old = _aside(target, "partial"), _aside(target, "old")
    recover_folder(target)
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        yield partial
        _open_to_readers(partial)
        sync_tree(partial)
        if replace and target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            recover_folder(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def require_replaceable(target: Path) -> None:
    """Raise OSError for a file, which is the user's own, and for the folder that this process works in.

    Whoever stands in a folder that is replaced stands in a deleted one: the user's shell too.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, and no folder", str(target))
    if target.is_dir() and target.samefile("."):
        raise OSError(errno.EBUSY, "it is the working directory: go to another one", str(target))


def _open_to_readers(folder: Path) -> None:
    """Give all in ``folder`` the rights that the user's umask grants: safetensors makes files of mode 0600.

    The folder itself was made under the umask, which has no safe reader in a process with threads.
    """
    granted = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(granted if path.is_dir() else granted & 0o666)


def recover_folder(target: Path) -> None:
    """Undo a replacement that was cut off: the earlier folder gets its name back. Raises OSError.

    Only for the one process that writes there: another one's replacement may be on its way.
    """
    target = _real(target)
    old = _aside(target, "old")
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def remove_folder(target: Path) -> None:
    """Delete a folder. It disappears at once: no reader finds a part of it.

    What a killed process left beside it goes too. Raises OSError, also for a file or a link: it stays.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, "it is a file or a link, and no folder", str(target))
    gone = _aside(target, "gone")
    for leftover in (_aside(target, "old"), _aside(target, "partial"), gone):
        if leftover.exists():
            shutil.rmtree(leftover)
    if target.exists():
        target.rename(gone)
        shutil.rmtree(gone)


def make_folder(path: Path) -> None:
    """Create a folder and the missing ones above it, all on the disk. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def _real(target: Path) -> Path:
    """``target`` without links: "." has no name of its own, and a link would be replaced by what it names."""
    return Path(os.path.realpath(target))


def _aside(target: Path, role: str) -> Path:
    target = target.absolute()
    return target.parent / f".{target.name}.{role}"


def read_json(path: Path, kind: type[T]) -> T:
    """Read ``path`` as ``kind``, a dataclass or any type that pydantic checks. Unknown fields are ignored.

    Strict: "4" is no int. Raises FileNotFoundError for a missing file and FileError for all else.
    """
    try:
        return parse_json(path.read_bytes(), kind)
    except FileNotFoundError:
        raise
    except (OSError, FileError) as error:
        raise FileError(f"{path} cannot be used: {error}") from None


def parse_json(content: bytes | str, kind: type[T]) -> T:
    """``content`` as ``kind``, as ``read_json`` does it. Raises FileError, without a file's name."""
    try:
        value: T = _adapter(kind).validate_json(content, strict=True)
        return value
    except ValidationError as error:
        raise FileError(one_line(error)) from None


def dump_json(value: Any, indent: int | None = 1) -> str:
    """``value`` (dataclasses, tuples, mappings) as JSON; a number that is not finite becomes null."""
    return _adapter(type(value)).dump_json(value, indent=indent).decode()


def one_line(error: ValidationError) -> str:
    """The first fault, e.g. "ledger.pending: Input should be a valid list", and how many more there are."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    return " ".join(f"{place + ': ' if place else ''}{first['msg']}{more}".split())


def sync_tree(folder: Path) -> None:
    """Bring all below ``folder`` to the disk: a later rename cannot come before what it renames."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def write_digests(folder: Path) -> None:
    """Write the digests of all files that are below ``folder`` now. Raises OSError."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_digest, (folder / name for name in names))
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    # The last line covers those before it: a list that was cut off, or changed, is no list.
    body = "".join(lines)
    (folder / DIGESTS).write_text(f"{body}# {hashlib.sha256(body.encode()).hexdigest()}\n", encoding="utf-8")


def check_digests(folder: Path) -> None:
    """Raise FileError, in one line, for the first file that is missing or not as it was written."""
    names = read_digests(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            present = list(pool.map(_digest, (folder / name for name in names)))
        except FileNotFoundError as error:
            missing = Path(str(error.filename)).relative_to(folder)
            raise FileError(f"{folder} is incomplete: {missing} is missing") from None
        except OSError as error:
            raise FileError(f"{folder} cannot be read: {error}") from None
    for (name, digest), found in zip(names.items(), present, strict=True):
        if found != digest:
            raise FileError(f"{folder} is damaged: {name} is not as it was written")


def read_digests(folder: Path) -> dict[str, str]:
    """The digest of each file by its name. Raises FileError for a list that is not as it was written."""
    try:
        text = (folder / DIGESTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{folder} is incomplete: {DIGESTS} is missing") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{folder} is damaged: {DIGESTS} cannot be read ({error})") from None
    body, _, seal = text.rpartition("# ")
    matches = [_LINE.fullmatch(line) for line in body.splitlines()]
    if seal.strip() != hashlib.sha256(body.encode()).hexdigest():
        raise FileError(f"{folder} is damaged: {DIGESTS} is not as it was written")
    return {match[2]: match[1] for match in matches if match is not None}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
