"""Says of each sampled stretch which of the episode's questions it served, as far as the environment knows.

    flashcards of a write --Attributor--> CardUse each --> WriteRecord.uses
    an extraction   --> the questions that its cards are about; where there are none, those whose answers
                        its context tells, which a card might have asked
    the k-th answer --> the k-th question
                        --> ActionSpan.serves, from which the learner takes credit by question

What the memory writes beside flashcards, such as a summary, serves the whole episode: ``serves`` stays None.
So do the answers of a memory that samples more than once for an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.environments.base import Attributor, Environment
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import ActionSpan, Segment, SpanKind, Trajectory, WriteRecord
from configs.user_code import owned


def attributed(trajectory: Trajectory, environment: Environment, chat: ChatFormat) -> Trajectory:
    """Return ``trajectory`` with what the environment says of it. Raises TaskError."""
    if not isinstance(environment, Attributor):
        return trajectory
    whom = f"task {trajectory.task.id}: the attribution of {environment.name}"
    with owned(whom, TaskError):  # of a user's environment: it costs the episode, not the worker
        return _Attribution(trajectory, environment, chat).made()


@dataclass(frozen=True, slots=True)
class _Sampled:
    """One generation: the spans [first, last) of a segment, more than one where weights changed under it."""

    segment: int
    first: int
    last: int
    kind: SpanKind


class _Attribution:
    def __init__(self, trajectory: Trajectory, environment: Attributor, chat: ChatFormat) -> None:
        self._trajectory, self._environment, self._chat = trajectory, environment, chat
        self._sampled = [
            sampled
            for place, segment in enumerate(trajectory.segments)
            for sampled in _generations(place, segment)
        ]
        self._serves: dict[_Sampled, tuple[int, ...]] = {}

    def made(self) -> Trajectory:
        writes = tuple(map(self._with_uses, self._trajectory.writes))
        self._attribute_answers()
        self._attribute_extractions(writes)
        segments = enumerate(self._trajectory.segments)
        return replace(
            self._trajectory, writes=writes, segments=tuple(self._marked(*pair) for pair in segments)
        )

    def _with_uses(self, record: WriteRecord) -> WriteRecord:
        task = self._trajectory.task
        uses = tuple(self._environment.use_of(task, card) for card in record.flashcards)
        return replace(
            record, uses=tuple(replace(use, questions=self._checked(use.questions)) for use in uses)
        )

    def _attribute_answers(self) -> None:
        answers = [sampled for sampled in self._sampled if sampled.kind == "act"]
        if len(answers) == len(self._trajectory.outcome.answers):
            self._serves |= {sampled: (place,) for place, sampled in enumerate(answers)}

    def _attribute_extractions(self, writes: Sequence[WriteRecord]) -> None:
        """Find each write's extraction by its text: a memory may sample other texts in between."""
        texts = iter([sampled for sampled in self._sampled if sampled.kind == "extract"])
        for record in writes:
            asked = next((sampled for sampled in texts if self._text(sampled) == record.extraction), None)
            if asked is None:
                return
            cards = sorted({place for use in record.uses for place in use.questions})
            self._serves[asked] = tuple(cards) or self._told_before(asked)

    def _told_before(self, sampled: _Sampled) -> tuple[int, ...]:
        segment = self._trajectory.segments[sampled.segment]
        context = self._chat.decode(segment.token_ids[: segment.spans[sampled.first].start].tolist())
        return self._checked(self._environment.questions_told(self._trajectory.task, context))

    def _text(self, sampled: _Sampled) -> str:
        segment = self._trajectory.segments[sampled.segment]
        start, end = segment.spans[sampled.first].start, segment.spans[sampled.last - 1].end
        return self._chat.said(segment.token_ids[start:end].tolist())

    def _marked(self, place: int, segment: Segment) -> Segment:
        spans: list[ActionSpan] = list(segment.spans)
        for sampled, serves in self._serves.items():
            if sampled.segment == place:
                for number in range(sampled.first, sampled.last):
                    spans[number] = replace(spans[number], serves=serves)
        return replace(segment, spans=tuple(spans))

    def _checked(self, questions: Sequence[int]) -> tuple[int, ...]:
        asked = len(self._trajectory.outcome.answers)
        if any(not 0 <= place < asked for place in questions):
            raise TaskError(
                f"task {self._trajectory.task.id}: the environment attributed something to the questions "
                f"{list(questions)}, but there are {asked} answers: places count from 0"
            )
        return tuple(questions)


def _generations(place: int, segment: Segment) -> list[_Sampled]:
    found: list[_Sampled] = []
    for number, span in enumerate(segment.spans):
        last = found[-1] if found else None
        if last is not None and last.kind == span.kind and segment.spans[number - 1].end == span.start:
            found[-1] = replace(last, last=number + 1)
        else:
            found.append(_Sampled(place, number, number + 1, span.kind))
    return found
