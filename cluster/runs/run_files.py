"""Lists the files of a run that belong into a store, and says how far a run went, here or there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from cluster.runs.checkpoint import STATE_FILE, Place, list_checkpoints, place_of
from cluster.runs.run_folders import FINISHED, NUMBER, finished_steps, returns
from cluster.runs.store import Manifest, StoredFile, StoredRun, checkpoint_of

Stat = tuple[int, int, int]  # size, time, inode


class Standing(NamedTuple):
    """How far a run went. Of two copies of a run the greater went further."""

    returns: int
    finished: int  # the steps after which it was done; -1: it is not
    newest: Place  # of its checkpoints


def files_of(run_dir: Path, below: str = "") -> dict[str, Stat]:
    """(size, time, inode) of each file of a run that belongs into a store, by its path in the folder.

    Hidden ones are not whole, or locks. MLflow's outbox is of this machine; figures.jsonl has the figures.
    What is pruned meanwhile is left out. Raises OSError.
    """
    found = {}
    for folder, folders, names in os.walk(run_dir / below, onerror=_unless_gone):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or ".sqlite" in name:
                continue
            path = Path(folder, name)
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if S_ISREG(stat.st_mode):
                found[str(path.relative_to(run_dir))] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return dict(sorted(found.items()))


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def without(
    files: Mapping[str, StoredFile], here: Collection[str], units: Iterable[str]
) -> dict[str, StoredFile]:
    """Those of ``files`` that are not ``here``; of checkpoints those that are none of ``units``."""
    known = {*units}
    return {
        path: content
        for path, content in files.items()
        if (unit not in known if (unit := checkpoint_of(path)) else path not in here)
    }


def standing(run_dir: Path) -> Standing:
    """How far the run in a folder went."""
    places = [place_of(folder) for folder in list_checkpoints(run_dir)]
    return Standing(returns(run_dir), finished_steps(run_dir), max(places, default=(-1, -1)))


@contextmanager
def outline(run: StoredRun, manifest: Manifest, only_number: bool = False) -> Iterator[Path]:
    """A folder with those small files of a stored run that say which run it is, and how far it went.

    Raises StoreError, DamagedError.
    """

    def says(path: str) -> bool:
        if only_number:
            return path == NUMBER
        return path in (NUMBER, FINISHED) or path == f"{checkpoint_of(path)}/{STATE_FILE}"

    with tempfile.TemporaryDirectory() as folder:
        run.take(manifest, Path(folder) / "run", says)
        yield Path(folder) / "run"
