"""A run's files in a store, so that the run outlives its machine: S3, Google's, or another mounted disk.

    <url>/<run>/blobs/<sha256>           the content of a file, named by its digest: never another one
    <url>/<run>/manifest-00000012.json   which files the run has, each with its digest: written last

A manifest names only what was put before it. A writer that is killed leaves the one before, and blobs that
nobody names. A reader compares each file with its digest. So a torn upload is never believed. A new manifest
has the next number and the mark of its writer: a machine that is taken for dead, and is not, sees another's.
Readers hold no lock. Where a run goes on, and deletes what a reader still wants, the reader begins again with
the newest manifest.

Every request has a deadline (filesystems.py). Errors are one line, without a credential.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, NonNegativeInt

from cluster.common.errors import ClusterError
from cluster.runs.filesystems import open_filesystem
from configs.bounds import ConfigError
from configs.files import FileError, dump_json, new_folder, parse_json

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_CHUNK = 8 * 2**20
_READS = 3  # of the newest manifest, while the run goes on
_BLOBS = "blobs"
_MANIFEST = re.compile(r"manifest-(\d{8})\.json")
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# What a store says to a request that it refuses; else it does not answer, and may later.
_REFUSALS = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "Permission denied",
    "Read-only",
    "Not a directory",
)
_log = logging.getLogger(__name__)


class StoreError(ClusterError):
    """A store does not answer, or refuses."""


class DamagedError(ClusterError):
    """A file in a store is missing, or is not what was put there."""


class ChangedError(RuntimeError):
    """A local file is not, or no longer, what its digest says."""


def _plain(path: str) -> str:
    """A manifest may come from anywhere: its files stay in the run's folder."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise ValueError("is no path in a run's folder")
    return path


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("is no digest")
    return text


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a run by its content."""

    sha256: Annotated[str, AfterValidator(_digest)]
    size: NonNegativeInt


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a run, by their paths in its folder."""

    number: NonNegativeInt
    writer: str
    files: dict[Annotated[str, AfterValidator(_plain)], StoredFile] = field(default_factory=dict)
    format: Literal["engram-store-1"] = "engram-store-1"


@dataclass(frozen=True)
class Store:
    """The runs at ``url``. Nothing is asked before the first call; all calls raise StoreError."""

    url: str
    timeout_s: float

    def runs(self) -> list[str]:
        """The names of the folders there."""
        with _asking(self.url):
            if self.filesystem.type_name == "gcs":
                # pyarrow lists no folders: there are none, but what the names of files begin with
                files = _listed(self.filesystem, self.root, recursive=True)
                names = (entry.path.removeprefix(f"{self.root}/").partition("/") for entry in files)
                return sorted({name for name, slash, _ in names if slash})
            folders = _listed(self.filesystem, self.root)
            return sorted(folder.base_name for folder in folders if not folder.is_file)

    def run(self, name: str) -> StoredRun:
        address, options, rest = self.url.partition("?")
        return StoredRun(self, f"{address.rstrip('/')}/{name}{options}{rest}", f"{self.root}/{name}")

    def require_writable(self) -> None:
        """Put a file and delete it. Raises ConfigError for a refusal, StoreError where nobody answers."""
        trial = f"{self.root}/.engram-{os.getpid()}"
        try:
            with _asking(self.url):
                with opened(self.filesystem, trial) as file:
                    file.write(b"x")
                self.filesystem.delete_file(trial)
        except StoreError as error:
            if any(refusal in str(error) for refusal in _REFUSALS):
                cure = "give another output_dir, or mend the credentials in the environment"
                raise ConfigError(f"output_dir: {error}; {cure}") from None
            raise

    @cached_property
    def root(self) -> str:
        """The place of the runs, as ``filesystem`` names it."""
        parts = urlsplit(self.url)
        return (parts.netloc + unquote(parts.path)).rstrip("/")

    @cached_property
    def filesystem(self) -> FileSystem:
        """The way to the store. Raises OSError."""
        return open_filesystem(self.url, self.timeout_s)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One run in a store: ``url`` for people, ``root`` for pyarrow. All calls raise StoreError."""

    store: Store
    url: str
    root: str

    def numbers(self) -> list[int]:
        """The numbers of the manifests, whole or not, the newest first."""
        with _asking(self.url):
            names = [entry.base_name for entry in _listed(self.store.filesystem, self.root) if entry.is_file]
        return sorted((int(match[1]) for name in names if (match := _MANIFEST.fullmatch(name))), reverse=True)

    def newest(self) -> Manifest | None:
        """The newest whole manifest; None where there is none."""
        for _ in range(_READS):
            numbers = self.numbers()
            for number in numbers:
                place = self._manifest(number)
                with (
                    _asking(self.url),
                    suppress(FileNotFoundError, FileError),
                    self.store.filesystem.open_input_stream(place) as file,
                ):
                    return parse_json(file.read(), Manifest)
            if not numbers or self.numbers() == numbers:  # else a newer one has come, and they are deleted
                break
        return None

    def blobs(self) -> set[str]:
        """The digests of all blobs, whole or not."""
        with _asking(self.url):
            return {entry.base_name for entry in _listed(self.store.filesystem, f"{self.root}/{_BLOBS}")}

    def put(self, path: Path, content: StoredFile, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Put the file at ``path``, as far as ``content`` goes, while it ``goes_on``.

        Raises ChangedError where the file holds something else, OSError where it cannot be read.
        """
        place = self._blob(content.sha256)
        with path.open("rb") as file, _asking(self.url), opened(self.store.filesystem, place) as blob:

            def write(chunk: bytes) -> None:
                if not goes_on():
                    raise OSError("no more time")
                blob.write(chunk)

            copied = _copied(file.read, write, content.size)
        if copied != content:
            self.delete({content.sha256})
            raise ChangedError(f"{path} changed while it was read")

    def write(self, manifest: Manifest) -> None:
        """Write a manifest, and delete those before it."""
        with _asking(self.url), opened(self.store.filesystem, self._manifest(manifest.number)) as file:
            file.write(dump_json(manifest).encode())
        with suppress(StoreError):  # the next one deletes it
            for number in self.numbers():
                if number < manifest.number:
                    with _asking(self.url), suppress(FileNotFoundError):
                        self.store.filesystem.delete_file(self._manifest(number))

    def delete(self, digests: set[str]) -> None:
        """Delete blobs that no manifest names any longer."""
        for digest in digests:
            with _asking(self.url), suppress(FileNotFoundError):
                self.store.filesystem.delete_file(self._blob(digest))

    def take(
        self, manifest: Manifest, target: Path, wanted: Callable[[str], bool] = lambda path: True
    ) -> dict[str, StoredFile]:
        """Fill the new folder ``target`` with the ``wanted`` files, each compared with its digest.

        Where one is missing and there is a newer manifest, that one is taken. Of a checkpoint with a damaged
        file none is taken, and a warning names it. Raises DamagedError for any other, and OSError. Returns
        what was taken.
        """
        taken: dict[str, StoredFile] = {}
        with new_folder(target) as partial:
            for reads in range(1, _READS + 1):
                files = {path: content for path, content in manifest.files.items() if wanted(path)}
                damaged = self._fill(partial, files, taken)
                newest = self.newest() if damaged and reads < _READS else None
                if newest is None or newest == manifest:
                    break
                manifest = newest
            for path, problem in damaged.items():
                if not (unit := checkpoint_of(path)):
                    raise DamagedError(f"{self.url}: {path} {problem}")
                _log.warning("warning: %s: %s is passed over: %s %s", self.url, unit, path, problem)
        return taken

    def _fill(
        self, folder: Path, files: Mapping[str, StoredFile], taken: dict[str, StoredFile]
    ) -> dict[str, str]:
        """Take what is not ``taken`` yet, forget what is none of ``files``, and say what is damaged, and how.

        It ends at the first damaged file outside checkpoints, and looks at one of each checkpoint.
        """
        for path in [path for path, content in taken.items() if files.get(path) != content]:
            _forget(folder, taken, path)
        damaged: dict[str, str] = {}
        for path, content in files.items():
            unit = checkpoint_of(path)
            if path in taken or (unit and any(checkpoint_of(other) == unit for other in damaged)):
                continue
            try:
                self._take(content, folder / path)
                taken[path] = content
            except DamagedError as error:
                damaged[path] = str(error)
                _forget(folder, taken, path)
                if not unit:
                    break
        return damaged

    def _take(self, content: StoredFile, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._reading(content.sha256):
            blob = self.store.filesystem.open_input_stream(self._blob(content.sha256))

        def read(size: int) -> bytes:
            with self._reading(content.sha256):
                chunk: bytes = blob.read(size)
                return chunk

        with blob, path.open("wb") as file:
            copied = _copied(read, file.write, content.size + 1)
        if copied != content:
            raise DamagedError("is not what was put there")

    @contextmanager
    def _reading(self, digest: str) -> Iterator[None]:
        """Raise DamagedError where the blob is not there, also where it was deleted while it was read."""
        from pyarrow import ArrowException
        from pyarrow.fs import FileType

        with _asking(self.url):
            try:
                yield
            except (OSError, ArrowException):
                if self.store.filesystem.get_file_info(self._blob(digest)).type is FileType.NotFound:
                    raise DamagedError("is missing there") from None
                raise

    def _manifest(self, number: int) -> str:
        return f"{self.root}/manifest-{number:08d}.json"

    def _blob(self, digest: str) -> str:
        return f"{self.root}/{_BLOBS}/{digest}"


def checkpoint_of(path: str) -> str:
    """The folder of the checkpoint that a file is of; "" for other files."""
    parts = PurePosixPath(path).parts
    return f"{parts[0]}/{parts[1]}" if parts[0] == "checkpoints" and len(parts) > 2 else ""


def _forget(folder: Path, taken: dict[str, StoredFile], path: str) -> None:
    """Delete a file that was taken, or in part; of a checkpoint all of it, as it is none any more."""
    unit = checkpoint_of(path)
    if unit:
        shutil.rmtree(folder / unit, ignore_errors=True)
    else:
        (folder / path).unlink(missing_ok=True)
    for other in [other for other in taken if other == path or (unit and checkpoint_of(other) == unit)]:
        del taken[other]


def digest_of(path: Path, size: int) -> StoredFile:
    """The first ``size`` bytes of a file. Raises OSError."""
    with path.open("rb") as file:
        return _copied(file.read, lambda chunk: None, size)


@contextmanager
def opened(filesystem: FileSystem, place: str) -> Iterator[BinaryIO]:
    """A file in a store to be written. Only a disk has folders that must be there before."""
    if filesystem.type_name == "local":
        filesystem.create_dir(place.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(place) as file:
        yield file


def _copied(read: Callable[[int], bytes], write: Callable[[bytes], object], size: int) -> StoredFile:
    """Hand at most ``size`` bytes on, and say what they were."""
    digest, left = hashlib.sha256(), size
    while left and (chunk := read(min(left, _CHUNK))):
        write(chunk)
        digest.update(chunk)
        left -= len(chunk)
    return StoredFile(digest.hexdigest(), size - left)


def _listed(filesystem: FileSystem, place: str, recursive: bool = False) -> list[FileInfo]:
    from pyarrow.fs import FileSelector

    return filesystem.get_file_info(FileSelector(place, allow_not_found=True, recursive=recursive))


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Raise StoreError for what a store, or the way to it, says."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{url} {_said(error)}") from None


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, f"({name})")
    return f"does not answer, or refuses ({text[:300]})"
