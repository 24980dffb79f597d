"""Keeps some episodes of a run as records, beside the training and never in its way.

    loop: step, batch --draw by lot--> queue --a thread: fetch, describe, save--> <run>/episodes/ --> sink (MLflow traces)
    stream: failed siblings ---------->  |
    evaluation: its first tasks ------>  |

Invariant: nothing here raises into the run or makes it wait. A queue that is full, a disk that is full, a group that is gone cost records, which are
counted, and said in one line at the end.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.episodes.episode import derived_seed
from actors.episodes.group_summary import GroupSummary
from actors.text.chat_template import ChatFormat
from actors.types import FailedEpisode, PolicyVersion, Task, Trajectory, TrajectoryGroup
from cluster.fleet.stream import Batch
from cluster.inspection.describe import describe, describe_failure
from cluster.inspection.record import FOLDER, Origin, Record, Source, save, save_text
from cluster.measure.rows import EpisodeSource, EvaluationRow
from configs.load import to_yaml
from configs.schema import EpisodesConfig, RunConfig

_MOST_WAITING = 64  # jobs; each may hold a group in memory
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Who else wants a record: must return at once, and not raise."""

    def add(self, record: Record) -> None: ...


@dataclass(frozen=True, slots=True)
class _Scene:
    """What the episodes of one step or row have in common."""

    config: RunConfig
    source: Source
    label: str
    step: int


class EpisodeRecorder:
    """One of a run. ``fetch`` (what a FinishedGroup leads to) is called on its thread; it may block and raise."""

    def __init__(
        self,
        settings: EpisodesConfig,
        run_dir: Path,
        chat: ChatFormat,
        fetch: Callable[[Any], TrajectoryGroup],
        sink: Sink,
    ) -> None:
        self._settings, self._run_dir = settings, run_dir
        self._chat, self._fetch, self._sink = chat, fetch, sink
        self._named: dict[str, str] = {}  # the settings' files
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="episode-recorder", daemon=True)
        self._failures = 0  # records of failed episodes
        self._problem = ""
        self.lost = 0

    def on_batch(self, config: RunConfig, step: int, batch: Batch) -> None:
        """The groups that the learner's ``step`` was made of: ``episodes.per_step`` of their episodes are kept."""
        scene = _Scene(config, "train", "", step)
        everyone = [
            (place, number)
            for place, group in enumerate(batch.groups)
            for number in range(len(group.summary.episodes))
        ]
        draw = np.random.default_rng(derived_seed(config.seed, "kept episodes", step)).permutation(
            len(everyone)
        )
        chosen = [everyone[index] for index in draw[: self._settings.per_step]]
        for place in sorted({place for place, _ in chosen}):
            content, numbers = (
                batch.groups[place].content,
                [number for group, number in chosen if group == place],
            )

            def keep(content: Any = content, numbers: Sequence[int] = tuple(numbers)) -> None:
                group = self._fetch(content)
                self._keep_finished(scene, group, [group.trajectories[number] for number in numbers])

            self._submit(keep)

    def on_failures(self, config: RunConfig, step: int, summary: GroupSummary) -> None:
        """A training group's failed siblings."""
        self._submit_failures(
            _Scene(config, "train", "", step), summary.failed, summary.policy_version, summary.worker
        )

    def watch(self, sources: Sequence[EpisodeSource], config: RunConfig, step: int) -> list[EpisodeSource]:
        """``sources`` for an evaluation of the policy after ``step``: the first ``episodes.per_evaluation`` tasks of its row are kept."""
        return [_Watched(source, self, config, step) for source in sources]

    def on_evaluated(
        self, config: RunConfig, step: int, position: int, row: EvaluationRow, group: TrajectoryGroup
    ) -> None:
        scene = _Scene(replace(config, memory=row.memory, seed=row.seed), "evaluation", row.label, step)
        self._submit_failures(scene, group.failed, group.policy_version, group.worker)
        if position < self._settings.per_evaluation and group.trajectories:
            self._submit(lambda: self._keep_finished(scene, group, group.trajectories))

    def close(self, seconds: float) -> None:
        """After the last call: wait at most ``seconds`` for what is still to be written."""
        if self._thread.is_alive():
            deadline, left = time.monotonic() + seconds, self._jobs.qsize()
            with suppress(queue.Full):
                self._jobs.put(None, timeout=seconds)
                self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self.lost += left
                self._problem = self._problem or "the run ended first"
        if self.lost:
            _log.warning(
                "warning: %d episodes that were to be kept in %s are not (%s)",
                self.lost,
                self._run_dir / FOLDER,
                self._problem,
            )

    def _submit(self, job: Callable[[], None]) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._lose("more came than could be written")

    def _submit_failures(
        self, scene: _Scene, failed: Sequence[FailedEpisode], version: PolicyVersion, worker: str
    ) -> None:
        kept = failed[: max(0, self._settings.failed - self._failures)]
        self._failures += len(kept)
        if kept:
            self._submit(
                lambda: self._keep(
                    [describe_failure(failure, version, self._origin(scene, worker)) for failure in kept]
                )
            )

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001  a lost object, a full disk, a damaged group: none may reach the run
                self._lose(" ".join(f"{type(error).__name__}: {error}".split())[:300])

    def _lose(self, problem: str) -> None:
        self.lost += 1
        self._problem = self._problem or problem

    def _keep_finished(
        self, scene: _Scene, group: TrajectoryGroup, trajectories: Sequence[Trajectory]
    ) -> None:
        receipts = scene.config.engine.receipts == "always"
        siblings = [trajectory.outcome.reward for trajectory in group.trajectories]
        self._keep(
            [
                describe(one, self._chat, self._origin(scene, group.worker), receipts, siblings)
                for one in trajectories
            ]
        )

    def _keep(self, records: Sequence[Record]) -> None:
        for record in records:
            save(record, self._run_dir / FOLDER)
            self._sink.add(record)

    def _origin(self, scene: _Scene, worker: str) -> Origin:
        """Puts the settings beside the records, once for each that differs."""
        name = self._named.get(repr(scene.config), "")
        if not name:
            text = to_yaml(scene.config)
            name = f"settings-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.yaml"
            save_text(text, self._run_dir / FOLDER / name)
            self._named[repr(scene.config)] = name
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
    """An EpisodeSource whose episodes the recorder sees as they finish."""

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


class NoSink:
    """Records are files only."""

    def add(self, record: Record) -> None:
        pass


def chat_of(model_path: Path) -> ChatFormat:
    """The chat format of the model in ``model_path``; a second or two."""
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(str(model_path)))


def from_object_store(reference: Any) -> TrajectoryGroup:
    """A group where the worker left it. Raises what Ray raises."""
    import ray

    group: TrajectoryGroup = ray.get(reference, timeout=60)
    return group
