"""Says of each sampled stretch which of the episode's questions it served, as far as the environment knows.

    flashcards of a write --Attributor--> CardUse each --> WriteRecord.uses
    an extraction   --> of each card's tokens: the questions that the card is about, and those that the
                        context tells and no card is about; of its other tokens: the latter, or all that
                        the context tells where no question was forgotten
    the k-th answer --> the k-th question
                        --> ActionSpan.serves, from which the learner takes credit by question

So a card has the credit of what is asked of it, and shares that of what the extraction forgot. Why: with
credit for its own questions alone, cards on one fact of two earn as much as cards on both.

What the memory writes beside flashcards, such as a summary, serves the whole episode: ``serves`` stays None.
So do the answers of a memory that samples more than once for an answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.environments.base import Attributor, Environment
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import card_items
from actors.types import ActionSpan, CardUse, Flashcard, Segment, SpanKind, Trajectory, WriteRecord
from configs.user_code import owned


def attributed(trajectory: Trajectory, environment: Environment, chat: ChatFormat) -> Trajectory:
    """Return ``trajectory`` with what the environment says of it. Raises TaskError."""
    if not isinstance(environment, Attributor):
        return trajectory
    whom = f"task {trajectory.task.id}: the attribution of {environment.name}"
    with owned(whom, TaskError):  # of a user's environment: it costs the episode, not the worker
        return _Attribution(trajectory, environment, chat).made()


def generations(segment: Segment) -> list[list[ActionSpan]]:
    """The spans of each generation: several where the weights, or what its tokens served, changed."""
    found: list[list[ActionSpan]] = []
    for span in segment.spans:
        if found and found[-1][-1].kind == span.kind and found[-1][-1].end == span.start:
            found[-1].append(span)
        else:
            found.append([span])
    return found


@dataclass(frozen=True, slots=True)
class _Sampled:
    """One generation: tokens [start, end) of a segment."""

    segment: int
    start: int
    end: int
    kind: SpanKind


Stretch = tuple[int, tuple[int, ...]]
"""The token of a segment before which it ends, and the questions that its tokens served."""


class _Attribution:
    def __init__(self, trajectory: Trajectory, environment: Attributor, chat: ChatFormat) -> None:
        self._trajectory, self._environment, self._chat = trajectory, environment, chat
        self._sampled = [
            _Sampled(place, spans[0].start, spans[-1].end, spans[0].kind)
            for place, segment in enumerate(trajectory.segments)
            for spans in generations(segment)
        ]
        self._stretches: dict[_Sampled, list[Stretch]] = {}

    def made(self) -> Trajectory:
        writes = tuple(map(self._with_uses, self._trajectory.writes))
        self._attribute_answers()
        self._attribute_extractions(writes)
        segments = enumerate(self._trajectory.segments)
        return replace(
            self._trajectory, writes=writes, segments=tuple(self._marked(*pair) for pair in segments)
        )

    def _with_uses(self, record: WriteRecord) -> WriteRecord:
        return replace(record, uses=tuple(map(self._use_of, record.flashcards)))

    def _attribute_answers(self) -> None:
        answers = [sampled for sampled in self._sampled if sampled.kind == "act"]
        if len(answers) == len(self._trajectory.outcome.answers):
            self._stretches |= {sampled: [(sampled.end, (place,))] for place, sampled in enumerate(answers)}

    def _attribute_extractions(self, writes: Sequence[WriteRecord]) -> None:
        """Find each write's extraction by its text: a memory may sample other texts in between."""
        texts = iter([sampled for sampled in self._sampled if sampled.kind == "extract"])
        for record in writes:
            asked = next((sampled for sampled in texts if self._text(sampled) == record.extraction), None)
            if asked is None:
                return
            self._stretches[asked] = self._of_extraction(asked, record)

    def _of_extraction(self, sampled: _Sampled, record: WriteRecord) -> list[Stretch]:
        items = [
            (item, {place for card in cards for place in self._use_of(card).questions})
            for item, cards in card_items(record.extraction)
        ]
        # Cards that were nearly JSON may stand in no array: then all tokens served what any card is about.
        about = {place for use in record.uses for place in use.questions}.union(*(own for _, own in items))
        told = self._told_before(sampled)
        missed = set(told) - about
        rest = tuple(sorted(missed)) or told or tuple(sorted(about))
        if not any(own for _, own in items):
            return [(sampled.end, tuple(sorted(about | missed)))]
        stretches: list[Stretch] = []
        text = self._raw(sampled, sampled.end)
        place = max(text.find(record.extraction), 0)
        for item, own in items:
            place = max(text.find(item, place), place) + len(item)
            stretches.append((self._token_at(sampled, place), tuple(sorted(own | missed)) if own else rest))
        return [*stretches, (sampled.end, rest)]

    def _token_at(self, sampled: _Sampled, characters: int) -> int:
        """The end of the tokens that spell so many characters of the generation."""
        ends = range(sampled.start, sampled.end + 1)
        return sampled.start + bisect_left(ends, characters, key=lambda end: len(self._raw(sampled, end)))

    def _raw(self, sampled: _Sampled, end: int) -> str:
        segment = self._trajectory.segments[sampled.segment]
        return self._chat.decode(segment.token_ids[sampled.start : end].tolist())

    def _told_before(self, sampled: _Sampled) -> tuple[int, ...]:
        segment = self._trajectory.segments[sampled.segment]
        context = self._chat.decode(segment.token_ids[: sampled.start].tolist())
        return self._checked(self._environment.questions_told(self._trajectory.task, context))

    def _text(self, sampled: _Sampled) -> str:
        segment = self._trajectory.segments[sampled.segment]
        return self._chat.said(segment.token_ids[sampled.start : sampled.end].tolist())

    def _marked(self, place: int, segment: Segment) -> Segment:
        spans: list[ActionSpan] = []
        for span in segment.spans:
            owner = next(
                one for one in self._sampled if one.segment == place and one.start <= span.start < one.end
            )
            spans += _cut(span, self._stretches.get(owner, []))
        return replace(segment, spans=tuple(spans))

    def _use_of(self, card: Flashcard) -> CardUse:
        use = self._environment.use_of(self._trajectory.task, card)
        return replace(use, questions=self._checked(use.questions))

    def _checked(self, questions: Sequence[int]) -> tuple[int, ...]:
        asked = len(self._trajectory.outcome.answers)
        if any(not 0 <= place < asked for place in questions):
            raise TaskError(
                f"task {self._trajectory.task.id}: the environment attributed something to the questions "
                f"{list(questions)}, but there are {asked} answers: places count from 0"
            )
        return tuple(questions)


def _cut(span: ActionSpan, stretches: Sequence[Stretch]) -> list[ActionSpan]:
    """The parts of ``span`` in each of the stretches; itself where there are none."""
    parts: list[ActionSpan] = []
    start = span.start
    for end, serves in stretches:
        if start < min(end, span.end):
            parts.append(replace(span, start=start, end=min(end, span.end), serves=serves))
            start = parts[-1].end
    return parts or [span]
