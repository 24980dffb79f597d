"""Puts the files of a run into a store, in the background: the store's copy is a little behind, never torn.

    the run --saved()--> a thread: what is new in the folder? --blobs, then a manifest--> <url>/<run>/
                                   first rows, config, figures; then each checkpoint, the newest first

Every file in a run's folder is whole as soon as it has its name (configs/files.py), or only grows. So a look
at the folder is enough. What was pruned here is deleted there, after what replaces it is there.

Every wait, and its bound:
    saved       none: it only wakes the thread
    a request   store.timeout_s without a byte; then a pause, and again, as long as the run lasts
    close       store.finish_timeout_s; a few seconds where the run was told to stop and the store is away

The folder itself is the outbox. A store that is away costs one line, and another one when it is back.
"""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cluster.common.backoff import backoff_s
from cluster.runs.checkpoint import Place, list_checkpoints, place_of
from cluster.runs.run_folders import FINISHED, NUMBER, finished_steps
from cluster.runs.store import (
    ChangedError,
    DamagedError,
    Manifest,
    Store,
    StoredFile,
    StoredRun,
    StoreError,
    checkpoint_of,
    digest_of,
)
from configs.digests import FILE as DIGESTS
from configs.digests import read_digests
from configs.files import FileError
from configs.schema import RunConfig
from configs.store_url import is_url

_AT_ONCE = 4  # files; a checkpoint has some large ones
_STOPPED_WAIT_S = 5.0  # for a store that is away, where the run was told to stop
_CLOSING_PAUSE_S = 5.0
_SAY_AFTER_S = 3.0
Standing = tuple[int, Place]  # the steps after which a run was done, and its last checkpoint
_Stat = tuple[int, int, int]


class _TakenOver(Exception):
    """Another machine has written a manifest of the run."""


class Mirror:
    """Keeps the copy of ``run_dir`` in ``run``. ``say`` is given the few lines that the user must know."""

    def __init__(self, run: StoredRun, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run, self._run_dir, self._say = run, run_dir, say
        self._writer = uuid.uuid4().hex
        self._manifest: Manifest | None = None  # the last one, which is ours
        self._there: set[str] = set()  # digests of the blobs that are surely whole
        self._kept: dict[str, StoredFile] = {}  # checkpoints of another machine, which went further
        self._digests: dict[str, tuple[_Stat, StoredFile]] = {}
        self._damaged: dict[str, Mapping[str, _Stat]] = {}  # checkpoints that are not what their digests say
        self._swept = False
        self._problem = ""
        self._complete = self._closing = self._given_up = self._taken_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def saved(self) -> None:
        """Something is whole in the folder that was not before. Returns at once."""
        self._complete = False
        self._wake.set()

    def close(self, seconds: float, stopped: bool = False) -> None:
        """Put the rest there, and say what is not. ``stopped``: the run was told to end. The last call."""
        self._closing = True
        self.saved()
        self._thread.join(min(_SAY_AFTER_S, seconds))
        if stopped and self._problem:
            seconds = min(seconds, _STOPPED_WAIT_S)
        if self._thread.is_alive() and seconds > _SAY_AFTER_S:
            self._say(f"{self._waiting()}: they are put into {self._run.url} now, for {seconds:g} s at most")
            self._thread.join(seconds - _SAY_AFTER_S)
        self._given_up = True
        if self._complete:
            self._say(f"stored:   {self._run.url} ({_amount(self._files.values())})")
        elif not self._taken_over:
            why = self._problem or f"it took more than {seconds:g} s"
            self._say(
                f"warning: {self._waiting()} and are not in {self._run.url} ({why}); the same command with "
                "resume=auto on this machine puts them there"
            )

    def _waiting(self) -> str:
        """What is here and not there, for a message."""
        there = self._manifest.files if self._manifest is not None else {}
        waiting = [
            StoredFile("0" * 64, stat[0])
            for path, stat in files_of(self._run_dir).items()
            if (known := self._digests.get(path)) is None or known[0] != stat or there.get(path) != known[1]
        ]
        return f"{_amount(waiting)}, wait in {self._run_dir}"

    # --- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        while not self._given_up:
            self._wake.clear()
            try:
                self._round()
                failures = 0
                self._solved()
            except _TakenOver:
                return
            except (StoreError, OSError) as error:  # of the disk too: it is full, or broken
                failures += 1
                self._failed(" ".join(str(error).split()))
            if not self._wake.is_set():
                if self._closing and not failures:
                    return
                longest = _CLOSING_PAUSE_S if self._closing else backoff_s(failures + 1)
                self._wake.wait(min(longest, backoff_s(failures + 1)) if failures else None)

    def _failed(self, problem: str) -> None:
        if not self._problem and not self._given_up:
            self._say(f"warning: {problem}: the run goes on; {self._waiting()} and are tried again")
        self._problem = problem

    def _solved(self) -> None:
        if self._problem and not self._given_up:
            self._say(f"{self._run.url} answers again: all of {self._run_dir} is there")
        self._problem = ""
        self._complete = not self._wake.is_set()

    def _round(self) -> None:
        if self._manifest is None:
            self._claim()
        here = files_of(self._run_dir)
        units: dict[str, dict[str, _Stat]] = {"": {}}
        for path, stat in here.items():
            units.setdefault(checkpoint_of(path), {})[path] = stat
        newest = [f"checkpoints/{folder.name}" for folder in reversed(list_checkpoints(self._run_dir))]
        goal = dict(self._kept)
        for unit in ("", *newest):
            entries = self._put(unit, units.get(unit, {}))
            goal |= entries
            self._write({**self._files, **entries})
        self._write(goal)  # without what is gone here
        self._sweep()

    @property
    def _files(self) -> Mapping[str, StoredFile]:
        assert self._manifest is not None
        return self._manifest.files

    def _claim(self) -> None:
        """Go on from what is there, and mark it as ours."""
        number, newest = max(self._run.numbers(), default=0), self._run.newest()
        files = {} if newest is None else newest.files
        if newest is not None and self._is_ahead(newest):
            here = {f"checkpoints/{folder.name}" for folder in list_checkpoints(self._run_dir)}
            self._kept = {path: files[path] for path in files if checkpoint_of(path) not in {"", *here}}
        manifest = Manifest(number + 1, self._writer, files)
        self._run.write(manifest)
        self._there = {content.sha256 for content in files.values()} & self._run.blobs()
        self._manifest = manifest

    def _is_ahead(self, there: Manifest) -> bool:
        try:
            with outline(self._run, there) as folder:
                return standing(folder) > standing(self._run_dir)
        except DamagedError:  # what is here is put there again
            return False

    def _put(self, unit: str, stats: Mapping[str, _Stat]) -> dict[str, StoredFile]:
        """Put the files of a checkpoint, or ("") all others. Returns what is there then.

        A checkpoint that was pruned meanwhile, or is damaged, is none at all.
        """
        if unit and self._damaged.get(unit) == stats:
            return {}
        try:
            entries = dict(self._entries(unit, stats))
            missing = {
                content.sha256: (self._run_dir / path, content)
                for path, content in entries.items()
                if content.sha256 not in self._there
            }
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._put_one, missing.values()))
        except (FileNotFoundError, ChangedError, FileError) as error:
            if not unit:  # replaced while it was read: it is new again
                self._wake.set()
                return {path: content for path, content in self._files.items() if path in stats}
            if not isinstance(error, FileNotFoundError):
                self._damaged[unit] = dict(stats)
                self._say(f"warning: {self._run_dir / unit} is not put into {self._run.url}: {error}")
            return {}
        return entries

    def _put_one(self, item: tuple[Path, StoredFile]) -> None:
        path, content = item
        self._run.put(path, content, lambda: not self._given_up)
        self._there.add(content.sha256)

    def _entries(self, unit: str, stats: Mapping[str, _Stat]) -> Iterator[tuple[str, StoredFile]]:
        """The files by content. A checkpoint says itself what its files hold; they are checked on the way."""
        folder = self._run_dir / unit
        sealed = read_digests(folder) if unit and (folder / DIGESTS).exists() else {}
        for path, stat in stats.items():
            known = self._digests.get(path)
            if known is None or known[0] != stat:
                said = sealed.get(path.removeprefix(f"{unit}/"))
                content = StoredFile(said, stat[0]) if said else digest_of(self._run_dir / path, stat[0])
                known = self._digests[path] = (stat, content)
            yield path, known[1]

    def _write(self, files: Mapping[str, StoredFile]) -> None:
        """Write the next manifest where something differs, and nobody else has written one."""
        assert self._manifest is not None
        if files == self._files:
            return
        number = self._manifest.number
        if (last := max(self._run.numbers(), default=0)) > number:
            other = self._run.newest()
            if other is not None and other.writer != self._writer:
                self._taken_over = True
                self._complete = False
                self._say(
                    f"warning: another machine goes on with this run in {self._run.url}: this one puts "
                    f"nothing more there, and works on in {self._run_dir}"
                )
                raise _TakenOver
            number = last  # ours: the store took it, and its answer was lost
        manifest = Manifest(number + 1, self._writer, dict(files))
        self._run.write(manifest)
        self._manifest = manifest

    def _sweep(self) -> None:
        """Delete blobs that the last manifest does not name; the first time also those of killed writers."""
        needed = {content.sha256 for content in self._files.values()}
        found = self._there if self._swept else self._there | self._run.blobs()
        self._run.delete(found - needed)
        self._there &= needed
        self._swept = True


@contextmanager
def mirrored(config: RunConfig, run_dir: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Mirror ``run_dir`` into the store of ``output_dir`` during the block, and at its end; else do nothing.

    The block's value is to be called when something was saved.
    """
    if not is_url(config.output_dir):
        yield lambda: None
        return
    store = Store(config.output_dir, config.store.timeout_s)
    mirror = Mirror(store.run(run_dir.name), run_dir, say)
    mirror.start()
    stopped = True
    try:
        yield mirror.saved
        stopped = False
    finally:
        mirror.close(config.store.finish_timeout_s, stopped)


def files_of(run_dir: Path) -> dict[str, _Stat]:
    """(size, time, inode) of each file of a run that belongs into a store, by its path in the folder.

    Hidden ones are not whole, or locks. MLflow's outbox is of this machine; figures.jsonl has the figures.
    """
    found = {}
    for path in sorted(run_dir.rglob("*")):
        relative = path.relative_to(run_dir)
        if any(part.startswith(".") for part in relative.parts) or ".sqlite" in path.name:
            continue
        try:
            stat = path.stat()
        except FileNotFoundError:  # pruned meanwhile
            continue
        if path.is_file():
            found[str(relative)] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def standing(run_dir: Path) -> Standing:
    """How far the run in a folder went."""
    places = [place_of(folder) for folder in list_checkpoints(run_dir)]
    return finished_steps(run_dir), max(places, default=(-1, -1))


@contextmanager
def outline(run: StoredRun, manifest: Manifest) -> Iterator[Path]:
    """A folder with those small files of a stored run that say which run it is, and how far it went.

    Raises StoreError, DamagedError.
    """

    def says(path: str) -> bool:
        return path in (NUMBER, FINISHED) or path == f"{checkpoint_of(path)}/state.json"

    with tempfile.TemporaryDirectory() as folder:
        run.take(manifest, Path(folder) / "run", says)
        yield Path(folder) / "run"


def _amount(contents: Iterable[StoredFile]) -> str:
    sizes = [content.size for content in contents]
    return f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"
