"""Puts the files of a run into a store, in the background: the store's copy is a little behind, never torn.

    the run --saved()--> a thread: what is new in the folder? --blobs, then a manifest--> <url>/<run>/
                                   first rows, config, figures; then each checkpoint, the newest first

Every file in a run's folder is whole as soon as it has its name (configs/files.py), or only grows. So a look
at the folder is enough. What was pruned here is deleted there, after what replaces it is there. Files that
another machine put there are kept.

Every wait, and its bound:
    saved       none: it only wakes the thread
    a request   a few store.timeout_s without a byte; then a pause, and again, as long as the run lasts
    close       store.finish_timeout_s; where the run was told to stop, 5 s without an answer from the store
    the end     of the process: until the request that is on its way meets its deadline

The folder itself is the outbox. A store that is away costs one line, and another one when it is back.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.common.patience import backoff_s
from cluster.runs.checkpoint import list_checkpoints
from cluster.runs.run_files import Stat, files_of, outline, standing, without
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
from configs.files import DIGESTS, FileError, read_digests
from configs.schema import RunConfig
from configs.store_url import is_url

_AT_ONCE = 4  # files; a checkpoint has some large ones
_STOPPED_WAIT_S = 5.0  # for a store that does not answer, where the run was told to stop
_CLOSING_PAUSE_S = 5.0
_SAY_AFTER_S = 3.0
_log = logging.getLogger(__name__)


class _TakenOver(Exception):
    """Another machine has written a manifest of the run."""


class Mirror:
    """Keeps the copy of ``run_dir`` in ``run``. ``say`` is given the few lines that the user must know."""

    def __init__(self, run: StoredRun, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run, self._run_dir, self._say = run, run_dir, say
        self._writer = uuid.uuid4().hex
        self._manifest: Manifest | None = None  # the last one, which is ours
        self._there: dict[str, int] = {}  # sizes of the blobs that are surely whole, by their digests
        self._kept: dict[str, StoredFile] = {}  # what another machine put there
        self._digests: dict[str, tuple[Stat, StoredFile]] = {}
        self._damaged: dict[str, Mapping[str, Stat]] = {}  # checkpoints that are not what their digests say
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
        begun, self._closing = time.monotonic(), True
        try:
            self.saved()
            self._await(seconds, stopped)
        finally:
            self._given_up = True
            self._say_end(time.monotonic() - begun)

    def _await(self, seconds: float, stopped: bool) -> None:
        """Wait until all is there. Where the run was told to stop, only while the store answers."""
        end = time.monotonic() + seconds
        answer = self._ask() if stopped else None
        self._thread.join(min(_SAY_AFTER_S, seconds))
        if not self._thread.is_alive() or seconds <= _SAY_AFTER_S:
            return
        if answer is not None and not answer.wait(_STOPPED_WAIT_S - _SAY_AFTER_S):
            self._problem = self._problem or f"no answer within {_STOPPED_WAIT_S:g} s"
            return
        self._tell(f"{self._waiting()}: they are put into {self._run.url} now, for {seconds:g} s at most")
        while self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            lost = stopped and bool(self._problem)
            self._thread.join(min(left, _STOPPED_WAIT_S if lost else 0.5))
            if lost and self._problem:
                return

    def _ask(self) -> threading.Event:
        """Ask the store something small. The event is set once it answers; a store may hang for long."""
        answered = threading.Event()

        def ask() -> None:
            with suppress(StoreError):
                self._run.numbers()
                answered.set()

        threading.Thread(target=ask, name="store asked", daemon=True).start()
        return answered

    def _say_end(self, waited_s: float) -> None:
        if self._complete:
            self._tell(f"stored:   {self._run.url} ({_amount(self._files.values())})")
        elif not self._taken_over:
            late = f"it took more than {waited_s:.0f} s" if self._thread.is_alive() else "it was given up"
            self._tell(
                f"warning: {self._waiting()} and are not in {self._run.url} ({self._problem or late}); "
                "the same command with resume=auto on this machine puts them there"
            )

    def _waiting(self) -> str:
        """What is here and not there, for a message."""
        there = self._manifest.files if self._manifest is not None else {}
        try:
            here = files_of(self._run_dir)
        except OSError as error:
            return f"files, which cannot be listed ({error}), wait in {self._run_dir}"
        waiting = [
            StoredFile("0" * 64, found[0])
            for path, found in here.items()
            if (known := self._digests.get(path)) is None or known[0] != found or there.get(path) != known[1]
        ]
        return f"{_amount(waiting)}, wait in {self._run_dir}"

    def _tell(self, text: str) -> None:
        """Say it, where somebody still listens: a closed pipe does not end the copying."""
        with suppress(OSError, ValueError):
            self._say(text)

    # --- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        while not self._given_up:
            self._wake.clear()
            try:
                self._round()
            except _TakenOver:
                return
            except Exception as error:  # noqa: BLE001  no fault may end the thread
                failures += 1
                self._failed(error)
            else:
                failures = 0
                self._solved()
            if not self._wake.is_set():
                if self._closing and not failures:
                    return
                longest = _CLOSING_PAUSE_S if self._closing else backoff_s(failures + 1)
                self._wake.wait(min(longest, backoff_s(failures + 1)) if failures else None)

    def _failed(self, error: Exception) -> None:
        _log.debug("a round of the copying failed", exc_info=True)
        expected = isinstance(error, StoreError | OSError)  # of the disk too: it is full, or broken
        problem = " ".join(f"{'' if expected else f'{type(error).__name__}: '}{error}".split())
        if not self._problem and not self._given_up:
            goes_on = f"the run goes on; {self._waiting()} and are tried again"
            self._tell(f"warning: {problem}: {'it is tried again' if self._closing else goes_on}")
        self._problem = problem

    def _solved(self) -> None:
        if self._problem and not self._given_up:
            self._tell(f"{self._run.url} answers again: all of {self._run_dir} is there")
        self._problem = ""
        self._complete = not self._wake.is_set()

    def _round(self) -> None:
        if self._manifest is None:
            self._claim()
        newest = [f"checkpoints/{folder.name}" for folder in reversed(list_checkpoints(self._run_dir))]
        if not (here := files_of(self._run_dir)):  # a disk that is not mounted any longer, say
            raise FileNotFoundError(f"{self._run_dir} has no files any longer")
        units: dict[str, dict[str, Stat]] = {"": {}}
        for path, found in here.items():
            units.setdefault(checkpoint_of(path), {})[path] = found
        self._kept = without(self._kept, here, newest)
        goal = dict(self._kept)
        missing = {*newest}
        for unit in ("", *newest):
            if entries := self._put(unit, units.get(unit, {})):
                others = {path: known for path, known in self._files.items() if checkpoint_of(path) != unit}
                self._write({**(others if unit else self._files), **entries})
                goal |= entries
                missing.discard(unit)
        # The copy of one that is damaged here stays; so do all while what replaces them is not there.
        all_stay = not newest or newest[0] in missing
        for path, known in self._files.items():
            if (unit := checkpoint_of(path)) and (all_stay or unit in missing):
                goal[path] = known
        self._write(goal)  # without what is gone here
        self._sweep()

    @property
    def _files(self) -> Mapping[str, StoredFile]:
        assert self._manifest is not None
        return self._manifest.files

    def _claim(self) -> None:
        """Go on from what is there, and mark it as ours.

        Files that are not here are another machine's: they are kept. So are the checkpoints of one that went
        further; others were pruned here.
        """
        number, newest = max(self._run.numbers(), default=0), self._run.newest()
        files = {} if newest is None else newest.files
        ahead = newest is not None and self._is_ahead(newest)
        here = {f"checkpoints/{folder.name}" for folder in list_checkpoints(self._run_dir)}
        self._kept = without(files, files_of(self._run_dir), here if ahead else map(checkpoint_of, files))
        manifest = Manifest(number + 1, self._writer, files)
        self._run.write(manifest)
        blobs = self._run.blobs()
        self._there = {known.sha256: known.size for known in files.values() if known.sha256 in blobs}
        self._manifest = manifest

    def _is_ahead(self, there: Manifest) -> bool:
        try:
            with outline(self._run, there) as folder:
                return standing(folder) > standing(self._run_dir)
        except DamagedError:  # what is here is put there again
            return False

    def _put(self, unit: str, stats: Mapping[str, Stat]) -> dict[str, StoredFile]:
        """Put the files of a checkpoint, or ("") all others. Returns what is there then.

        A checkpoint that is damaged, or did not stay as it was all the while, is none at all.
        """
        if unit and (not stats or self._damaged.get(unit) == stats):  # no files: pruned just now, or a link
            return {}
        try:
            entries = self._entries(unit, stats)
            missing = {
                content.sha256: (self._run_dir / path, content)
                for path, content in entries.items()
                if content.sha256 not in self._there
            }
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._put_one, missing.values()))
            problem = None
        except (FileNotFoundError, ChangedError, FileError) as error:
            problem = error
        if not unit and problem is not None:  # replaced while it was read: it is new again
            self._wake.set()
            return {path: content for path, content in self._files.items() if path in stats}
        if unit and files_of(self._run_dir, unit) != stats:  # pruned, replaced, scored
            self._wake.set()
            return {}
        if problem is not None:
            self._damaged[unit] = dict(stats)
            self._tell(f"warning: {self._run_dir / unit} is not put into {self._run.url}: {problem}")
            return {}
        return entries

    def _put_one(self, item: tuple[Path, StoredFile]) -> None:
        path, content = item
        self._run.put(path, content, lambda: not self._given_up)
        self._there[content.sha256] = content.size

    def _entries(self, unit: str, stats: Mapping[str, Stat]) -> dict[str, StoredFile]:
        """The files by content. A checkpoint says itself what its files hold; they are checked on the way."""
        folder, entries = self._run_dir / unit, {}
        sealed = read_digests(folder) if unit and (folder / DIGESTS).exists() else {}
        if missing := {f"{unit}/{name}" for name in sealed} - stats.keys():
            raise FileError(f"it is incomplete: {min(missing)} is missing")
        for path, found in stats.items():
            known = self._digests.get(path)
            if known is None or known[0] != found:
                said = sealed.get(path.removeprefix(f"{unit}/"))
                content = StoredFile(said, found[0]) if said else digest_of(self._run_dir / path, found[0])
                if self._there.get(content.sha256, content.size) != content.size:
                    raise FileError(f"it is damaged: {path} is not as it was written")
                known = self._digests[path] = (found, content)
            entries[path] = known[1]
        return entries

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
                self._tell(
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
        found = {*self._there} if self._swept else {*self._there} | self._run.blobs()
        self._run.delete(found - needed)
        self._there = {digest: size for digest, size in self._there.items() if digest in needed}
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


def _amount(contents: Iterable[StoredFile]) -> str:
    sizes = [content.size for content in contents]
    return f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"
