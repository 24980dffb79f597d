"""The recorder: keeps some episodes of a run as records, beside the training and never in its way.

    loop: some of each batch -> queue --a thread: fetch, describe, save--> RUN/episodes/ --> MLflow traces
    stream: failed siblings --> |
    evaluation: first tasks --> |

Invariant: nothing here raises into the run or makes it wait. A full queue, a full disk or a lost group costs
records. They are counted, and named in one line at the end.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from actors.episodes.episode import derived_seed
from actors.episodes.group_summary import GroupSummary
from actors.text.chat_template import ChatFormat, open_chat
from actors.types import FailedEpisode, PolicyVersion, Task, Trajectory, TrajectoryGroup
from cluster.fleet.stream import Batch
from cluster.inspection.background import Background
from cluster.inspection.record import (
    FOLDER,
    Origin,
    Record,
    Source,
    describe,
    describe_failure,
    is_of_training,
    list_records,
    save,
    save_text,
)
from cluster.inspection.traces import EpisodeTraces
from cluster.measure.rows import EpisodeSource, EvaluationRow
from cluster.tracking.tracker import store_uri
from configs.load import to_yaml
from configs.schema import EpisodesConfig, RunConfig

_MOST_WAITING = 64  # jobs; each may hold a group in memory
_WAIT_S, _TRACES_WAIT_S = 30.0, 10.0  # at the end of a run
_STOPPED_WAIT_S = 2.0  # a run that was told to stop, or failed, needs its grace time for other things
_log = logging.getLogger(__name__)


@contextmanager
def recording(config: RunConfig, run_dir: Path, model_path: Path, run_id: str) -> Iterator[EpisodeRecorder]:
    """Record a run during the block; at its end everything is written. No ``run_id``: no traces."""
    wanted = config.episodes.traces and run_id
    traces = EpisodeTraces(store_uri(config.tracking, run_dir.parent), run_id) if wanted else None
    # now: two threads that import transformers at once meet it half imported
    chat = open_chat(model_path, config.model)
    sinks = () if traces is None else (traces.records.submit,)
    recorder = EpisodeRecorder(config.episodes, run_dir, chat, _from_object_store, sinks)
    wait = _WAIT_S
    try:
        yield recorder
    except BaseException:
        wait = _STOPPED_WAIT_S
        raise
    finally:
        recorder.close(wait)
        if traces is not None:
            traces.close(min(wait, _TRACES_WAIT_S, config.tracking.finish_timeout_s))


@dataclass(frozen=True, slots=True)
class _Scene:
    """What the episodes of one step, or of one row, have in common."""

    config: RunConfig
    source: Source
    label: str
    step: int


class EpisodeRecorder:
    """The recorder of one run.

    ``fetch`` gets a group by the ``content`` of its FinishedGroup. It runs on the recorder's thread, and may
    block and raise. ``sinks`` get each record after it was saved; they return at once and raise nothing.
    """

    def __init__(
        self,
        settings: EpisodesConfig,
        run_dir: Path,
        chat: ChatFormat,
        fetch: Callable[[Any], TrajectoryGroup],
        sinks: Sequence[Callable[[Record], None]],
    ) -> None:
        self._settings, self._run_dir = settings, run_dir
        self._chat, self._fetch, self._sinks = chat, fetch, sinks
        self._settings_files: dict[str, str] = {}  # file names, by the config's repr
        self.jobs: Background[Callable[[], None]] = Background(
            "episode-recorder", lambda job: job(), _explain, _MOST_WAITING
        )
        self._failures = 0  # records of failed episodes
        self._files: dict[Path, None] | None = None  # of training episodes, the oldest first

    def on_batch(self, config: RunConfig, step: int, batch: Batch) -> None:
        """Keep ``episodes.per_step`` of the episodes that the learner's ``step`` was made of.

        Siblings come first: the same task with another reward says more than another task.
        """
        scene = _Scene(config, "train", "", step)
        lot = np.random.default_rng(derived_seed(config.seed, "kept episodes", step))
        drawn = [
            (int(place), int(number))
            for place in lot.permutation(len(batch.groups))
            for number in lot.permutation(len(batch.groups[place].summary.episodes))
        ][: self._settings.per_step]
        for place, kept in groupby(sorted(drawn), key=itemgetter(0)):
            numbers = [number for _, number in kept]
            self.jobs.submit(partial(self._fetch_and_keep, scene, batch.groups[place].content, numbers))

    def on_failures(self, config: RunConfig, step: int, summary: GroupSummary) -> None:
        """Keep the failed siblings of a training group, at most ``episodes.failed`` in a run."""
        scene = _Scene(config, "train", "", step)
        self._keep_failed(scene, summary.failed, summary.policy_version, summary.worker)

    def watch(self, sources: Sequence[EpisodeSource], config: RunConfig, step: int) -> list[EpisodeSource]:
        """Wrap the ``sources`` of an evaluation after ``step``: the episodes of its first tasks are kept."""
        return [_Watched(source, self, config, step) for source in sources]

    def on_evaluated(
        self, config: RunConfig, step: int, position: int, row: EvaluationRow, group: TrajectoryGroup
    ) -> None:
        """Keep the episodes of the first ``episodes.per_evaluation`` tasks of a row."""
        scene = _Scene(replace(config, memory=row.memory, seed=row.seed), "evaluation", row.label, step)
        self._keep_failed(scene, group.failed, group.policy_version, group.worker)
        if position < self._settings.per_evaluation and group.trajectories:
            self.jobs.submit(lambda: self._keep_finished(scene, group, group.trajectories))

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` for what is still to be written. The last call."""
        self.jobs.close(seconds)
        if self.jobs.lost:
            text = "warning: %d episodes that were to be kept in %s are not (%s)"
            _log.warning(text, self.jobs.lost, self._run_dir / FOLDER, self.jobs.problem)

    def _fetch_and_keep(self, scene: _Scene, content: Any, numbers: Sequence[int]) -> None:
        group = self._fetch(content)
        self._keep_finished(scene, group, [group.trajectories[number] for number in numbers])

    def _keep_failed(
        self, scene: _Scene, failed: Sequence[FailedEpisode], version: PolicyVersion, worker: str
    ) -> None:
        kept = failed[: max(0, self._settings.failed - self._failures)]
        self._failures += len(kept)

        def keep() -> None:
            origin = self._origin(scene, worker)
            self._keep([describe_failure(failure, version, origin) for failure in kept])

        if kept:
            self.jobs.submit(keep)

    def _keep_finished(
        self, scene: _Scene, group: TrajectoryGroup, trajectories: Sequence[Trajectory]
    ) -> None:
        receipts = scene.config.engine.receipts == "always"
        siblings = [trajectory.outcome.reward for trajectory in group.trajectories]
        origin = self._origin(scene, group.worker)
        self._keep([describe(played, self._chat, origin, receipts, siblings) for played in trajectories])

    def _keep(self, records: Sequence[Record]) -> None:
        for record in records:
            self._prune(save(record, self._run_dir / FOLDER))
            for add in self._sinks:
                add(record)

    def _prune(self, saved: Path) -> None:
        """Delete the oldest files of training episodes beyond ``episodes.keep``, of earlier lives too."""
        if not self._settings.keep or not is_of_training(saved):
            return
        if self._files is None:
            self._files = dict.fromkeys(filter(is_of_training, list_records(self._run_dir)))
        self._files[saved] = None
        while len(self._files) > self._settings.keep:
            oldest = next(iter(self._files))
            del self._files[oldest]
            oldest.unlink(missing_ok=True)

    def _origin(self, scene: _Scene, worker: str) -> Origin:
        """Say where an episode comes from. Its settings stand beside the records, each version once."""
        name = self._settings_files.get(repr(scene.config), "")
        if not name:
            text = to_yaml(scene.config)
            name = f"settings-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.yaml"
            save_text(text, self._run_dir / FOLDER / name)
            self._settings_files[repr(scene.config)] = name
        return Origin(
            run=self._run_dir.name,
            source=scene.source,
            label=scene.label,
            step=scene.step,
            worker=worker,
            model=scene.config.model.name,
            memory=scene.config.memory.policy,
            config=name,
        )


class _Watched:
    """An EpisodeSource that shows its finished episodes to the recorder."""

    def __init__(
        self, source: EpisodeSource, recorder: EpisodeRecorder, config: RunConfig, step: int
    ) -> None:
        self._source, self._recorder, self._config, self._step = source, recorder, config, step

    @property
    def name(self) -> str:
        return self._source.name

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        group = await self._source.episode(position, task, row)
        self._recorder.on_evaluated(self._config, self._step, position, row, group)
        return group


def _from_object_store(reference: Any) -> TrajectoryGroup:
    """Get a group from Ray's object store, where the worker left it. Raises what Ray raises."""
    import ray

    group: TrajectoryGroup = ray.get(reference, timeout=60)
    return group


def _explain(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
