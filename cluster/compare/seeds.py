"""Trains one configuration over seeds, and over swept settings; then the runs are compared.

    train CONFIG --seeds 0,1 --sweep objective.advantage=grpo,rloo
        quickstart-grpo seed 0, seed 1, quickstart-rloo seed 0, seed 1     each in a process of its own
        --> compare

The same command again trains what is missing. A run that is finished is left as it is. One that was
interrupted goes on from its newest whole checkpoint. Both must have the settings that are asked for. A run
that fails does not stop the others.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import configs
from cluster.common.arguments import require_distinct
from cluster.common.display import Display
from cluster.common.errors import ClusterError
from cluster.common.folders import output_folder
from cluster.common.ray_job import job_overrides
from cluster.compare.runs import FREE, load_groups
from cluster.runs.checkpoint import list_checkpoints, newest_whole
from cluster.runs.from_store import bring_all
from cluster.runs.run_folders import finished_steps, runs_of
from configs.bounds import ConfigError
from configs.load import flatten, load_config
from configs.reference import settings
from configs.schema import RunConfig
from configs.store_url import is_url

_INTERRUPTED = 130
_LIST = re.compile(r",(?![^\[]*\])")  # a comma outside of brackets
_OWN = ("seed", "name", "resume")  # settings that --seeds and --sweep give
_START = "import sys; from cluster.cli import console_script; sys.argv[0] = 'engram'; console_script()"
Play = Callable[[Sequence[str]], int]
"""Runs ``engram`` with these words; returns its exit status."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One run: the words after ``engram train``, and its configuration."""

    words: tuple[str, ...]
    config: RunConfig

    @property
    def title(self) -> str:
        return f"{self.config.name}, seed {self.config.seed}"


def wanted_runs(path: Path, words: Sequence[str], seeds: Sequence[int], sweep: Sequence[str]) -> list[Wanted]:
    """All runs, by kind and then by seed. Raises ConfigError."""
    for word in words:
        if word.startswith(tuple(f"{key}=" for key in _OWN if key != "name")):
            raise ConfigError(f"argument {word!r}: --seeds sets it for each run; leave it out")
    require_distinct(sweep)
    axes = [_axis(path, argument, words) for argument in sweep]
    base = load_config(path, job_overrides(path, words, os.environ))
    runs = []
    for kind in product(*axes):
        name = "-".join([base.name, *(_word(value) for _, value in kind)])
        swept = [f"{key}={value}" for key, value in kind]
        for seed in seeds or (base.seed,):
            own = (*words, *swept, f"name={name}", f"seed={seed}")
            config = load_config(path, job_overrides(path, own, os.environ))
            runs.append(Wanted((str(path), *own), config))
    if len({(run.config.name, run.config.seed) for run in runs}) < len(runs):
        raise ConfigError("argument --sweep: two values give runs of the same name; write each value once")
    return runs


def _word(value: str) -> str:
    """``value`` as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", value).strip("-")


def _axis(path: Path, argument: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """(key, value) of each value of "key=a,b". Raises ConfigError."""
    key, equals, text = argument.partition("=")
    values = [value.strip() for value in _LIST.split(text)]
    if not equals or not all(values):
        raise ConfigError(f"--sweep {argument}: write key=value,value, e.g. learner.learning_rate=1e-4,2e-4")
    if key in _OWN:
        raise ConfigError(f"--sweep {argument}: {key} cannot be swept; seeds are given by --seeds")
    if key not in settings():
        load_config(path, [f"{key}={values[0]}"])  # its message guesses the right name
    if any(word.startswith(f"{key}=") for word in words):
        raise ConfigError(f"--sweep {argument}: {key} is also given as an argument; leave one out")
    return [(key, value) for value in values]


def train_runs(runs: Sequence[Wanted], verbose: bool, display: Display, play: Play) -> int:
    """Train what is missing, then compare all that are finished. Returns the exit status of a user's command.

    Raises ConfigError for an earlier run of the same name and seed that has other settings, before any run
    begins, and ClusterError at the end for runs that failed.
    """
    from cluster.compare.report import show_compared

    for config in {run.config.name: run.config for run in runs}.values():
        if is_url(config.output_dir):
            bring_all(config)  # the table needs them all
    missing = [run for run in runs if _finished(run) is None]
    display.say(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before")
    failed: list[str] = []
    for number, run in enumerate(missing, start=1):
        display.say(f"--- run {number} of {len(missing)}: {run.title}")
        status = play([*("train", *run.words), *_resume(run), *(["--verbose"] if verbose else [])])
        if status == _INTERRUPTED:
            display.say("the same command again goes on")
            return status
        if status:
            failed.append(run.title)
    folders = [folder for run in runs if (folder := _finished(run)) is not None]
    if folders:
        names = list(dict.fromkeys(run.config.name for run in runs))
        output = output_folder(runs[0].config) / f"{names[0]}-compared"
        show_compared(load_groups(folders), output, display)
    if failed:
        cure = "its own error stands above; the same command again goes on"
        raise ClusterError(f"{len(failed)} of {len(runs)} runs failed, the first {failed[0]}: {cure}")
    return 0


def _resume(run: Wanted) -> list[str]:
    """The words that let an interrupted run of this seed go on; [] to begin."""
    for folder in _earlier(run):
        if (checkpoint := newest_whole(folder)) is not None:
            return [f"resume={checkpoint.folder}"]
    return []


def _finished(run: Wanted) -> Path | None:
    """The folder of the run, once it is done.

    Raises ConfigError where it, or a run that could be resumed, has other settings than wanted. Only
    ``train.steps`` of the latter may differ: more steps are a reason to go on.
    """
    for folder in _earlier(run):
        done = finished_steps(folder) >= run.config.train.steps
        if done or list_checkpoints(folder):
            _require_same(folder, run.config, but=() if done else ("train.steps",))
        if done:
            return folder
    return None


def _earlier(run: Wanted) -> Iterator[Path]:
    """Runs of this name and seed, the newest first."""
    for folder in runs_of(output_folder(run.config), run.config.name):
        try:
            saved = load_config(folder / "config.yaml", [])
        except ConfigError:  # a run that died before it had written its settings
            continue
        if saved.seed == run.config.seed:
            yield folder


def _require_same(folder: Path, config: RunConfig, but: tuple[str, ...]) -> None:
    saved, given = flatten(load_config(folder / "config.yaml", [])), flatten(config)
    free = (*FREE, *but)
    other = next((key for key in given if saved[key] != given[key] and not key.startswith(free)), None)
    if other is not None:
        differs = f"has {other}={saved[other]}, not {given[other]}"
        cure = f"give these runs another name, e.g. name={config.name}-2, or another output_dir"
        raise ConfigError(f"{folder} is a run of this name and seed, and {differs}; {cure}")


def play_in_process(words: Sequence[str]) -> int:
    """Run ``engram`` in a process of its own. A stop of ours is its stop: it saves, then both end."""
    command = [sys.executable, "-P", "-c", _START, *words]  # -P: a cluster.py of the user's hides nothing
    code = [str(Path(configs.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(code)}
    with subprocess.Popen(command, env=environment) as process, _passing_on(process) as stopped:
        status = process.wait()
    return _INTERRUPTED if stopped else status


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand SIGTERM on, and note the signals that came in the value of the block.

    Ctrl-C reaches the process by itself: the terminal sends it to both. A process that gets SIGTERM twice, as
    from a Ray job's stop and from here, takes it once (cancel_on_sigterm).
    """
    stopped: list[int] = []

    def note(number: int, _: object) -> None:
        stopped.append(number)
        if number == signal.SIGTERM:
            process.send_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
