"""What the command ``memory`` does with a folder: shows it, or changes it with the model loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.text.flashcards import clean
from actors.types import FastWeights
from cluster.assistant.conversation import Conversation
from cluster.assistant.memory_file import (
    MEMORY_FILE,
    ForeignMemory,
    MemoryContent,
    load_memory,
    read_content,
    require_fits,
    require_place,
)
from cluster.assistant.opening import AssistantError, Opening, parts_of, prepare_opening
from cluster.assistant.tending import Edits, can_read, card_lines
from cluster.common.display import Display

_MOST_COLUMNS = 110


def show(folder: Path, display: Display) -> None:
    """List the flashcards. Raises AssistantError."""
    content = _content(folder)
    cards = content.cards
    count = f"{len(cards)} flashcard{'' if len(cards) == 1 else 's'}"
    display.say(f"{folder}: {count} in revision {content.revision}")
    display.say(f"model: {clean(content.model)}")
    if content.context_ids:
        display.say(f"not written yet: {len(content.context_ids)} tokens of conversation")
    for line in card_lines(cards, min(display.console.width, _MOST_COLUMNS)):
        display.say(line)


def change(
    folder: Path,
    edits: Edits,
    model: str,
    config: Path | None,
    settings: Sequence[str],
    allow_code: bool,
    display: Display,
) -> None:
    """Write the flashcards anew, onto ``model`` ("": their own). The folder is replaced, or stays as it is.

    Raises AssistantError, EngineError, WriterError, ReceiptError, and as ``prepare_opening`` does.
    """
    require_place(folder)
    content = _content(folder)
    before = content.cards
    cards = edits.applied(before)  # a wrong number is told before an engine starts
    opening = prepare_opening(model or content.model, config, settings, allow_code)
    foreign = _foreign(folder, opening)
    if foreign is not None and not model:
        raise foreign
    if foreign is None and cards == before:
        raise AssistantError(f"{folder}: nothing changes: it says that already, on this model")
    display.say(f"loading {opening.title} ...")
    with parts_of(opening, slots=1) as parts, asyncio.Runner() as runner:
        memory = content.memory(FastWeights(opening.basis.id, 0, {}))
        left_out = 0
        if not (foreign is None or foreign.same_weights or can_read(memory, parts)):
            memory, left_out = replace(memory, context_ids=(), context=""), len(memory.context_ids)
        require_fits(folder, len(memory.context_ids), opening)
        conversation = Conversation(parts, "memory", opening.system_prompt)
        rebuilt = runner.run(conversation.rebuild(memory, before, cards))
        conversation.save(folder, overwrite=True)
    if foreign is not None:
        display.say(f"{foreign.reason}: its flashcards were written anew")
    for line in rebuilt.lines():
        display.say(line)
    if left_out:
        display.say(f"{left_out} tokens of context are another tokenizer's: left out")
    display.say(f"{folder}: saved")


def _foreign(folder: Path, opening: Opening) -> ForeignMemory | None:
    """Why the Delta in ``folder`` is not one of ``opening``; None if it is. Raises AssistantError."""
    try:
        load_memory(folder, opening)
    except ForeignMemory as error:
        return error
    return None


def _content(folder: Path) -> MemoryContent:
    if (content := read_content(folder)) is None:
        raise AssistantError(
            f"{folder}: has no {MEMORY_FILE}, so nobody knows what is in its weights; "
            "give a folder that /save, --memory or serve wrote"
        )
    return content
