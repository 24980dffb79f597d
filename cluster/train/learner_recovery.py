"""Brings a lost learner back from the last checkpoint, while the rollout workers stay up.

    LearnerLost --> ranks ended and started again --> newest whole checkpoint --> the state to go on from

Where the run has no checkpoint yet, the learner goes back to the weights that the run began with. The
restored weights get a version that no worker has seen: adapters, journals and caches never mix two policies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from actors.types import PolicyVersion
from cluster.common.patience import backoff_s
from cluster.runs.checkpoint import (
    START,
    Checkpoint,
    Place,
    TrainState,
    list_checkpoints,
    newest_whole,
    place_of,
)
from learner.types import LearnerError, LearnerLost, UnreadableError


class RestartableLearner(Protocol):
    """What a recovery asks of the learner."""

    @property
    def version(self) -> PolicyVersion: ...

    def restart(self, folder: str | None, lost_versions: int) -> None:
        """Start all ranks again. Blocks, with a deadline of its own; raises LearnerError."""
        ...


@dataclass(slots=True)
class LearnerRecovery:
    """Restarts the learner of the run in ``run_dir``, at most ``retries`` times without a new checkpoint.

    ``start`` is what the run goes on from. Checkpoints that lie there already are no part of it: it may have
    gone back to an earlier one.
    """

    learner: RestartableLearner
    run_dir: Path
    start: Checkpoint | None
    retries: int
    say: Callable[[str], None]
    pause: Callable[[float], None] = time.sleep
    _before: Place = field(init=False)
    _at: Path | None = None  # the checkpoint of the last restart
    _restarts: int = 0  # there
    _refused: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = max(map(place_of, list_checkpoints(self.run_dir)), default=(-1, -1))

    def restart(self, error: LearnerLost, state: TrainState) -> tuple[TrainState, PolicyVersion]:
        """Bring the learner back. Blocks.

        ``state`` is where the run stood. Returns where it stands now, and the version that its checkpoint
        has on disk. Raises ``error``, or what the last restart raised, where ``retries`` are used up.
        """
        lost = self.learner.version
        while True:
            checkpoint = newest_whole(self.run_dir, self._refused, self._before) or self.start
            folder = None if checkpoint is None else checkpoint.folder
            saved = START if checkpoint is None else checkpoint.state
            self._count(folder, error)
            where = "the weights that the run began with" if folder is None else str(folder)
            self.say(
                f"the learner is lost ({error}): it starts again from {where} "
                f"(restart {self._restarts} of {self.retries} there), and the steps since then are made again"
            )
            self.pause(backoff_s(self._restarts))
            lost_versions = saved.lost_versions + lost + 1 - saved.version
            try:
                self.learner.restart(None if checkpoint is None else str(checkpoint.learner), lost_versions)
            except UnreadableError as unreadable:
                if checkpoint is self.start or folder is None:
                    raise
                self.say(f"the learner passes over a checkpoint: {folder} cannot be loaded: {unreadable}")
                self._refused.append(folder)
                continue
            except LearnerLost as again:
                error = again
                continue
            restored = replace(
                saved,
                version=self.learner.version,
                lost_versions=lost_versions,
                tracking_run_id=state.tracking_run_id,
                learner_restarts=state.learner_restarts + 1,
            )
            return restored, saved.version

    def _count(self, folder: Path | None, error: LearnerLost) -> None:
        """Count a restart. Raises ``error``, with what was tried, where there were enough of them."""
        if folder != self._at:
            self._at, self._restarts = folder, 0
        if self._restarts >= self.retries:
            tried = f" (after {self._restarts} restart(s) there)" if self._restarts else ""
            cure = "mend the cause, or raise train.learner_retries, then go on with resume=auto"
            raise LearnerError(f"{error}{tried}; {cure}") from error
        self._restarts += 1
