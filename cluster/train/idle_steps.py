"""Says it once when several training steps in a row taught nothing: such a run seldom gets out by itself."""

from __future__ import annotations

from collections.abc import Callable

from cluster.train.metrics import StepSummary

_MANY = 3  # a single one may be chance, where tasks are few or nearly all are solved


class IdleSteps:
    """Counts them. ``say`` tells the user."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._in_a_row = 0

    def after_step(self, summary: StepSummary) -> None:
        self._in_a_row = self._in_a_row + 1 if summary.without_signal else 0
        if self._in_a_row == _MANY:
            empty = f" ({summary.empty} extractions gave no flashcard)" if summary.empty else ""
            self._say(
                f"warning: {_MANY} steps in a row taught nothing: the siblings of each task earn alike, "
                f"reward {summary.reward:.3f}{empty}. Where the reward has fallen, go back to an earlier "
                "checkpoint (resume=) with a smaller learner.learning_rate; where it never rose, warm-start "
                "longer, take easier tasks, or raise sampling.temperature or train.group_size; where all is "
                "solved, take harder tasks"
            )
