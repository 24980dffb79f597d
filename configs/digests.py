"""Digests of the files of a folder: what a disk or a copy changes is found, also where no size differs.

<folder>/SHA256SUMS    a line for each file below, as ``sha256sum --check SHA256SUMS`` reads it
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configs.files import FileError

FILE = "SHA256SUMS"
_THREADS = 4  # hashlib releases the interpreter's lock; a disk is read faster by a few
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_digests(folder: Path) -> None:
    """Write the digests of all files that are below ``folder`` now. Raises OSError."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_digest, (folder / name for name in names))
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    # The last line covers those before it: a list that was cut off, or changed, is no list.
    body = "".join(lines)
    (folder / FILE).write_text(f"{body}# {hashlib.sha256(body.encode()).hexdigest()}\n", encoding="utf-8")


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
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{folder} is incomplete: {FILE} is missing") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{folder} is damaged: {FILE} cannot be read ({error})") from None
    body, _, seal = text.rpartition("# ")
    matches = [_LINE.fullmatch(line) for line in body.splitlines()]
    if seal.strip() != hashlib.sha256(body.encode()).hexdigest():
        raise FileError(f"{folder} is damaged: {FILE} is not as it was written")
    return {match[2]: match[1] for match in matches if match is not None}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
