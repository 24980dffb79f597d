"""The harness of the crash tests: a process that saves is killed or meets a full disk; readers are asked.

    kill_everywhere   one save, killed at its operation 1, 2, ... until it survives: a fresh folder each time
    kill_lives        a process saves 1, 2, 3, ... and is killed somewhere; the next one goes on in its folder
    fill_everywhere   one save on a disk that is full from its operation 1, 2, ... on

An operation is what changes a file: open for writing, write, fsync, rename, delete, make a folder. The
children are forks of this process.
"""

from __future__ import annotations

import errno
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

Work = Callable[[Path], None]
_DIED, _FAILED = 9, 1


def _is_write(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


@dataclass(slots=True)
class _Striker:
    """Counts the operations of this process on files below ``root``, and strikes at number ``left``."""

    root: str
    left: int
    strike: Callable[[], object]
    deletes: bool = True

    def count(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.strike()

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        """Python tells of an operation before it happens. An exception from here makes it fail."""
        watched = self.deletes and event in ("os.remove", "os.rmdir")  # rmtree gives them no more than a name
        if event in ("os.rename", "os.mkdir") or (event == "open" and _is_write(arguments[2])):
            watched = str(arguments[0]).startswith(self.root)
        if watched:
            self.count()

    def install(self) -> None:
        """Watch this process from now on; there is no way back, so it is a child."""
        fsync, plain = os.fsync, Path.write_text

        def counted_fsync(handle: int) -> None:
            self.count()
            fsync(handle)

        def counted_write(path: Path, text: str, *rest: object, **named: object) -> int:
            with io.open(path, "w", encoding="utf-8") as file:  # noqa: UP020  half of it is on the disk then
                file.write(text[: len(text) // 2])
                file.flush()
                self.count()
            return plain(path, text, *rest, **named)  # type: ignore[arg-type]

        os.fsync, Path.write_text = counted_fsync, counted_write  # type: ignore[method-assign, assignment]
        sys.addaudithook(self.audit)


def _die() -> NoReturn:
    os._exit(_DIED)


def _no_space() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _forked(work: Callable[[], None]) -> int:
    """The process id of a child that does ``work`` and ends with 0, or with 1 where that raises."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # a child must not go on with the tests
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(_FAILED)
        os._exit(0)
    return child


def killed_at(root: Path, work: Callable[[], None], dies_at: int) -> bool:
    """Run ``work`` in a child that dies at its operation ``dies_at``. False if it came to its end."""

    def doomed() -> None:
        _Striker(str(root), dies_at, _die).install()
        work()

    status = os.waitstatus_to_exitcode(os.waitpid(_forked(doomed), 0)[1])
    assert status in (0, _DIED), "the work itself failed"
    return status == _DIED


def kill_everywhere(
    tmp_path: Path, prepare: Work, work: Work, check: Callable[[Path, bool], None], most: int = 2000
) -> int:
    """Prepare a folder, kill ``work`` at operation 1, 2, ... and check what is left. Returns the kills."""
    for dies_at in range(1, most):
        root = tmp_path / f"at-{dies_at}"
        root.mkdir()
        prepare(root)
        died = killed_at(root, lambda root=root: work(root), dies_at)  # type: ignore[misc]
        check(root, died)
        shutil.rmtree(root)
        if not died:
            return dies_at - 1
    raise AssertionError("the work never ends")


# --- a full disk ------------------------------------------------------------------------------------------


def fill_everywhere(
    tmp_path: Path, prepare: Work, work: Work, refusal: type[Exception] | None, check: Work
) -> int:
    """Let the disk be full from operation 1, 2, ... of ``work`` on; then there is room, and ``check`` looks.

    ``work`` must raise ``refusal`` in one line, or nothing for None. Returns how often the disk was full.
    """
    for full_at in range(1, 2000):
        root = tmp_path / f"full-{full_at}"
        root.mkdir()
        prepare(root)

        def starved(root: Path = root, full_at: int = full_at) -> None:
            striker = _Striker(str(root), full_at, _no_space, deletes=False)
            striker.install()
            try:
                work(root)
            except Exception as error:
                assert refusal is not None and isinstance(error, refusal), repr(error)
                assert "No space left on device" in str(error) and "\n" not in str(error), str(error)
            else:
                assert striker.left > 0 or refusal is None, "the disk was full, and nobody said so"
            if striker.left > 0:
                os._exit(_DIED)  # it was never full

        status = os.waitstatus_to_exitcode(os.waitpid(_forked(starved), 0)[1])
        assert status in (0, _DIED), "not as it should be: see the line above"
        check(root)
        shutil.rmtree(root)
        if status == _DIED:
            return full_at - 1
    raise AssertionError("the work never ends")


# --- life after life --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saves:
    """Something that saves 1, 2, 3, ... and what its readers believe afterwards.

    ``begin`` opens a folder as a new process does, and returns what saves a number there. ``believed``
    returns the last number that readers find, whole and with all before it that should be there.
    ``operations``: about as many as a save has.
    """

    begin: Callable[[Path], Callable[[int], None]]
    believed: Callable[[Path], int]
    operations: int


def kill_lives(root: Path, saves: Saves, kills: int, seed: int = 0) -> int:
    """Kill a saving process ``kills`` times: at an operation, in the middle of a write, or at a moment.

    Each number that a process said to be saved must be believed by the next one, and none beyond the number
    that it was saving. Returns the last number.
    """
    lot, last = random.Random(seed), saves.believed(root)
    assert last == 0
    for life in range(kills):
        said = _life(root, saves, last, lot)
        now = saves.believed(root)
        assert max(said, last) <= now <= max(said, last) + 1, (
            f"life {life}: {last}, said {said}, believed {now}"
        )
        last = now
    return last


def _life(root: Path, saves: Saves, last: int, lot: random.Random) -> int:
    """A process that goes on from ``last`` until it is killed. Returns the last number that it said.

    It ends by itself after some saves: where no file grows, a limit on its size kills nobody.
    """
    how = lot.choice(("operation", "write", "moment"))
    dies_at, most = lot.randint(1, 3 * saves.operations), lot.randint(1, 12)
    largest = max((path.stat().st_size for path in root.rglob("*") if path.is_file()), default=0)
    longest = lot.choice((lot.randint(0, largest), largest + lot.randint(0, 3000)))
    ear, mouth = os.pipe()

    def live() -> None:
        os.close(ear)
        if how == "write":  # the kernel writes what fits, and kills
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))
        if how == "operation":
            _Striker(str(root), dies_at, _die).install()
        save = saves.begin(root)
        for number in range(last + 1, last + (40 if how == "moment" else most + 1)):
            save(number)
            os.write(mouth, b"%08d" % number)
        _die()

    child = _forked(live)
    os.close(mouth)
    with os.fdopen(ear, "rb", buffering=0) as said:
        numbers = b""
        if how == "moment":
            numbers = said.read(8)
            time.sleep(lot.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        while part := said.read(8192):
            numbers += part
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (_DIED, -signal.SIGKILL, -signal.SIGXFSZ), "the saving itself failed"
    return int(numbers[-8:]) if numbers else 0
