"""A write and its line in the episode's log, whatever the memory policy writes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from actors.memory.base import Agent
from actors.types import Flashcard, WriteExample, WriteRecord


async def record_write(
    agent: Agent, text: str, cards: Sequence[Flashcard], examples: Sequence[WriteExample], rejected: int
) -> None:
    """Write ``examples`` (at least one) into the fast weights and log it. ``text`` is what the agent said, ``rejected`` what of it was unusable."""
    result = await agent.actor.learn(examples)
    record = WriteRecord(
        revision=agent.actor.weights.revision,
        examples=tuple(examples),
        flashcards=tuple(cards),
        extraction=text,
        rejected_flashcards=rejected,
        prompt_tokens=sum(len(example.prompt_ids) for example in examples),
        answer_tokens=sum(len(example.answer_ids) for example in examples),
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        steps=result.steps,
        seconds=result.seconds,
        outcome=result.outcome,
        reason=result.reason,
    )
    agent.writes.append(record)


def record_nothing(agent: Agent, text: str, rejected: int, reason: str) -> None:
    """Log a write that did not happen, for ``reason``."""
    record = WriteRecord(
        revision=agent.actor.weights.revision,
        examples=(),
        flashcards=(),
        extraction=text,
        rejected_flashcards=rejected,
        prompt_tokens=0,
        answer_tokens=0,
        loss_before=math.nan,  # nothing was written, so there is no loss; an average that forgets this shows it
        loss_after=math.nan,
        steps=0,
        seconds=0.0,
        outcome="empty",
        reason=reason,
    )
    agent.writes.append(record)
