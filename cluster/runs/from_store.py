"""Takes runs from a store: what ``resume=auto`` goes on with on an empty machine, and runs to be looked at.

    the runs of the name, newest first --> finished? --> further than the folder here? --> taken down, checked
                                                     --> as far? --> what was measured elsewhere is added

What is here and did not go as far is set aside, not deleted: <run>.aside-1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from cluster.common.errors import CheckpointError
from cluster.common.folders import cache_of, output_folder
from cluster.runs.run_files import Standing, files_of, outline, standing
from cluster.runs.run_folders import finished_steps, is_run_of, nothing_left, number_of, runs_of
from cluster.runs.run_lock import held, require_free
from cluster.runs.store import DamagedError, Manifest, Store, StoredRun, StoreError, checkpoint_of
from configs.bounds import HIDDEN, ConfigError
from configs.files import FileError, dump_json, make_folder, read_json, remove_folder, write_text
from configs.schema import RunConfig
from configs.store_url import BOUND, is_allowed, is_url

_TIMEOUT_S = 30.0  # where no configuration says it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """A run in a store that can be taken."""

    run: StoredRun
    manifest: Manifest
    number: int
    standing: Standing

    @property
    def name(self) -> str:
        return self.run.root.rpartition("/")[2]


def bring_unfinished(config: RunConfig) -> None:
    """Take down what ``resume=auto`` goes on with, where the store has more of it than the folder here.

    Without an answer from the store a run that is here goes on. Raises StoreError where there is none, and
    AllFinished.
    """
    output_dir = output_folder(config)
    try:
        found = _find(config)
    except StoreError as error:
        if not _has_unfinished(config):
            cure = "so nobody knows what to go on with: try again, or start anew with resume="
            raise StoreError(
                f"{error}; no unfinished run of {config.name} is in {output_dir}, {cure}"
            ) from None
        _log.warning("warning: %s: the run goes on from %s", error, output_dir)
        return
    for one in found:
        here = output_dir / one.name
        unfinished = one.standing.finished < config.train.steps
        ahead = one.standing > standing(here) or not (here / "config.yaml").exists()
        if ahead and (unfinished or here.exists()):
            _take(one, here)
        elif unfinished and one.standing == standing(here):
            _add(one, here)
        if unfinished:
            return
    if found and not _has_unfinished(config):
        raise nothing_left(config.name, config.output_dir, found[0].name, found[0].standing.finished)


def _has_unfinished(config: RunConfig) -> bool:
    runs = runs_of(output_folder(config), config.name)
    return any(finished_steps(run) < config.train.steps for run in runs)


def named_here(config: RunConfig) -> Path:
    """Where the checkpoint that ``resume`` names lies on this machine, once it is taken from a store.

    Raises ConfigError.
    """
    if not is_url(config.resume):
        return Path(config.resume).expanduser().absolute()
    base, named = (text.partition("?")[0].rstrip("/") for text in (config.output_dir, config.resume))
    name, _, inside = named.removeprefix(f"{base}/").partition("/")
    if not named.startswith(f"{base}/") or not inside:
        example = f"{base if is_url(base) else 's3://bucket/runs'}/NAME/checkpoints/step-000050"
        raise ConfigError(f"resume={config.resume}: must be a checkpoint below output_dir, e.g. {example}")
    return output_folder(config) / name / inside


def bring_named(config: RunConfig) -> Path:
    """The checkpoint that ``resume`` names. One that is only in the store is taken down with its run.

    Raises ConfigError, CheckpointError, StoreError.
    """
    folder = named_here(config)
    if is_url(config.resume) and not folder.is_dir():
        name, _, inside = str(folder.relative_to(output_folder(config))).partition("/")
        found = list(_outlines(_begun(config, lambda folder: folder == name)))
        if not any(path.startswith(f"{inside}/") for one in found for path in one.manifest.files):
            raise CheckpointError(f"resume={config.resume}: is not in the store")
        _take(found[0], output_folder(config) / name)
    return folder


def bring_all(config: RunConfig) -> None:
    """Take down every run of the name that is not here, or not as far. Raises StoreError."""
    for one in _find(config):
        here = output_folder(config) / one.name
        if one.standing > standing(here) or not here.exists():
            _take(one, here)


def bring_newest(config: RunConfig, name: str) -> None:
    """Take down what is not here of the newest run of ``name``, an evaluation.

    Raises StoreError, and InUseError where a process works in the run's folder.
    """
    for one in _find(config, name)[:1]:
        if (here := output_folder(config) / one.name).exists():
            _add(one, here)
        else:
            _take(one, here)


def newest_number(config: RunConfig, name: str) -> int | None:
    """The highest number of the runs of ``name`` in the store; None where ``output_dir`` is a folder."""
    if not is_url(config.output_dir):
        return None
    highest = 0
    with suppress(StoreError):  # it was said when the store was tried
        for run, manifest in _begun(config, lambda folder: is_run_of(folder, name)):
            with suppress(DamagedError), outline(run, manifest, only_number=True) as folder:
                highest = max(highest, number_of(folder))
    return highest


def local_copy(text: str, weights: bool) -> Path:
    """``text`` as a path. Of an address the run is taken into the cache, checkpoints only with ``weights``.

    The address may be of a run, or of something in it. Raises ConfigError, StoreError, CheckpointError.
    """
    if not is_url(text):
        return Path(text)
    if not is_allowed(text):
        raise ConfigError(f"the address {HIDDEN} is not allowed: it must be {BOUND}")
    address, options, rest = text.partition("?")
    parts = address.rstrip("/").split("/")
    shortest = 5 if text.startswith("file:") else 4  # scheme, "", bucket (file: "" and a folder), the run
    for inner in range(min(5, len(parts) - shortest + 1)):  # up to RUN/checkpoints/step-000050/learner/model
        above = "/".join(parts[: len(parts) - inner - 1]) + options + rest
        run = Store(above, _TIMEOUT_S).run(parts[len(parts) - inner - 1])
        if (manifest := run.newest()) is not None:
            within = "/".join(parts[len(parts) - inner :])
            return _cached(run, manifest, within, weights) / within
    raise CheckpointError(
        f"{text}: no run was stored there; give the address of one, e.g. s3://bucket/runs/NAME"
    )


def _cached(run: StoredRun, manifest: Manifest, within: str, weights: bool) -> Path:
    """The copy of a run in the cache; the one from before where it is the same."""
    only = checkpoint_of(f"{within}/state.json")
    kind = (only.rpartition("/")[2] or "whole") if weights else "no-weights"
    target = cache_of("fetched", run.url) / kind / run.root.rpartition("/")[2]
    mark = target.with_name(f"{target.name}.manifest")

    def wanted(path: str) -> bool:
        unit = checkpoint_of(path)
        return not unit or (weights and only in ("", unit))

    files = {path: content for path, content in manifest.files.items() if wanted(path)}
    with suppress(FileNotFoundError, FileError):
        if target.is_dir() and read_json(mark, Manifest).files == files:
            return target
    _log.warning("taking %s into %s (%.0f MiB)", run.url, target, _mib(manifest, wanted))
    remove_folder(target)
    make_folder(target.parent)
    taken = run.take(manifest, target, wanted)
    write_text(mark, dump_json(replace(manifest, files=taken)))
    return target


def _find(config: RunConfig, name: str = "") -> list[_Found]:
    """The stored runs of the name that can be believed, the newest first."""
    runs = _begun(config, lambda folder: is_run_of(folder, name or config.name))
    return sorted(_outlines(runs), key=lambda one: (one.number, one.name), reverse=True)


def _begun(config: RunConfig, chosen: Callable[[str], bool]) -> Iterator[tuple[StoredRun, Manifest]]:
    """The stored runs whose names are ``chosen``; one that died before anything was there is none."""
    store = Store(config.output_dir, config.store.timeout_s)
    for run in [store.run(name) for name in store.runs() if chosen(name)]:
        if (manifest := run.newest()) is not None and "config.yaml" in manifest.files:
            yield run, manifest


def _outlines(runs: Iterable[tuple[StoredRun, Manifest]]) -> Iterator[_Found]:
    for run, manifest in runs:
        try:
            with outline(run, manifest) as folder:
                found = _Found(run, manifest, number_of(folder), standing(folder))
        except DamagedError as error:
            _log.warning("warning: a stored run is passed over: %s", error)
        else:
            yield found


def _take(one: _Found, here: Path) -> None:
    """Take a run down, and set aside what is here. Raises StoreError, DamagedError, InUseError, OSError."""
    _log.warning(
        "%s has more of the run than this machine: taking it into %s (%.0f MiB)",
        one.run.url,
        here,
        _mib(one.manifest, lambda path: True),
    )
    make_folder(here.parent)
    fresh = here.with_name(f"{here.name}.new")  # no run's name
    remove_folder(fresh)
    one.run.take(one.manifest, fresh)
    if here.exists():
        require_free(here)
        asides = (here.with_name(f"{here.name}.aside-{number}") for number in count(1))
        aside = next(path for path in asides if not path.exists())
        here.rename(aside)
        _log.warning("what was in %s is in %s", here, aside)
    fresh.rename(here)


def _add(one: _Found, here: Path) -> None:
    """Take down what another machine added to a run that is here too. Checkpoints are not looked at.

    A file that is here stays, but one that only grows (*.jsonl): it is taken where it is this one, grown.
    Where the store does not give them, a warning says it. Raises InUseError, OSError.
    """
    present = files_of(here)

    def wanted(path: str) -> bool:
        if checkpoint_of(path) or (path in present and not path.endswith(".jsonl")):
            return False
        return path not in present or one.manifest.files[path].size > present[path][0]

    if not any(map(wanted, one.manifest.files)):
        return
    with held(here):
        fresh = here.with_name(f"{here.name}.new")
        remove_folder(fresh)
        try:
            one.run.take(one.manifest, fresh, wanted)
        except (StoreError, DamagedError) as error:
            _log.warning("warning: what another machine added to %s is not taken: %s", here, error)
            return
        added = [path for path in files_of(fresh) if _is_more(fresh / path, here / path)]
        for path in added:
            make_folder((here / path).parent)
            (fresh / path).rename(here / path)
        remove_folder(fresh)
    if added:
        _log.warning("%s has files that were not here: %d are added to %s", one.run.url, len(added), here)


def _is_more(fresh: Path, known: Path) -> bool:
    return not known.exists() or fresh.read_bytes().startswith(known.read_bytes())


def _mib(manifest: Manifest, wanted: Callable[[str], bool]) -> float:
    return sum(content.size for path, content in manifest.files.items() if wanted(path)) / 2**20
