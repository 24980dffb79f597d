"""What the command ``memory`` does with a folder: shows it, or changes it with the model loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from actors.text.flashcards import clean
from cluster.assistant.conversation import Conversation
from cluster.assistant.memory_file import MEMORY_FILE, MemoryContent, read_content
from cluster.assistant.opening import AssistantError, parts_of, prepare_opening
from cluster.assistant.tending import Edits, card_lines
from cluster.common.display import Display
from configs.files import recover_folder

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
    recover_folder(folder)
    content = _content(folder)
    edits.applied(content.cards)  # a wrong number is told before an engine starts
    opening = prepare_opening(model or content.model, config, settings, allow_code)
    display.say(f"loading {opening.title} ...")
    with parts_of(opening, slots=1) as parts, asyncio.Runner() as runner:
        conversation = Conversation(parts, "memory", opening.system_prompt)
        rebuilt = runner.run(conversation.load(folder, edits))
        if rebuilt is None:
            raise AssistantError(f"{folder}: nothing changes: it says that already, on this model")
        conversation.save(folder, overwrite=True)
    for line in rebuilt.lines():
        display.say(line)
    display.say(f"{folder}: saved")


def _content(folder: Path) -> MemoryContent:
    if (content := read_content(folder)) is None:
        raise AssistantError(
            f"{folder}: has no {MEMORY_FILE}, so nobody knows what is in its weights; "
            "give a folder that /save, --memory or serve wrote"
        )
    return content
