"""What the command ``memory`` does with a folder: shows it, or changes it with the model loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from actors.protocols import ReceiptError, WriterError
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
from cluster.assistant.opening import AssistantError, Opening, Parts, parts_of, prepare_opening
from cluster.assistant.saved import names_in
from cluster.assistant.tending import Edits, Rebuilt, can_read, card_lines
from cluster.common.display import Display

_MOST_COLUMNS = 110


def show(folder: Path, display: Display) -> None:
    """List the flashcards, or the conversations of a folder that holds some. Raises AssistantError."""
    if names := _conversations(folder):
        _show_all(folder, names, display)
        return
    content = _content(folder)
    display.say(f"{folder}: {_count(content)}")
    display.say(f"model: {clean(content.model)}")
    if content.context_ids:
        display.say(f"not written yet: {len(content.context_ids)} tokens of conversation")
    for line in card_lines(content.cards, min(display.console.width, _MOST_COLUMNS)):
        display.say(line)


def change(
    folder: Path,
    edits: Edits,
    model: str,
    config: Path | None,
    settings: Sequence[str],
    allow_code: bool,
    display: Display,
) -> int:
    """Write the flashcards anew, onto ``model`` ("": their own). The folder is replaced, or stays as it is.

    Of a folder that holds conversations all are written onto ``model``. Returns how many failed.

    Raises AssistantError, EngineError, WriterError, ReceiptError, and as ``prepare_opening`` does.
    """
    if names := _conversations(folder):
        if edits:
            example = quote(str(folder / names[0]))
            raise AssistantError(
                f"{folder}: holds {len(names)} conversations; name one of them, e.g. {example}"
            )
        return _move_all(folder, names, prepare_opening(model, config, settings, allow_code), display)
    require_place(folder)
    content = _content(folder)
    edits.applied(content.cards)  # a wrong number is told before an engine starts
    opening = prepare_opening(model or content.model, config, settings, allow_code)
    foreign = _foreign(folder, opening)
    if foreign is not None and not model:
        raise foreign
    if foreign is None and edits.applied(content.cards) == content.cards:
        raise AssistantError(f"{folder}: nothing changes: it says that already, on this model")
    display.say(f"loading {opening.title} ...")
    with parts_of(opening, slots=1) as parts, asyncio.Runner() as runner:
        lines = _rewrite(folder, edits, foreign, parts, runner)
    for line in lines:
        display.say(line)
    display.say(f"{folder}: saved")
    return 0


def _move_all(root: Path, names: Sequence[str], opening: Opening, display: Display) -> int:
    """Write each conversation that another model made onto the model of ``opening``; returns how many failed.

    One that fails stays as it was and keeps no other from being moved. What was moved before a kill is kept:
    the same command again moves the rest. Raises EngineError.
    """
    failed, foreign = 0, dict[str, ForeignMemory]()
    for name in names:
        try:
            require_place(root / name)
            if (found := _foreign(root / name, opening)) is not None:
                foreign[name] = found
        except AssistantError as error:
            failed += 1
            display.say(f"error: {error}")
    own = len(names) - failed - len(foreign)
    if foreign:
        display.say(f"loading {opening.title} ...")
        with parts_of(opening, slots=1) as parts, asyncio.Runner() as runner:
            for name, found in foreign.items():
                try:
                    lines = _rewrite(root / name, Edits(), found, parts, runner)
                except (AssistantError, ReceiptError, WriterError) as error:
                    failed += 1
                    place = f"{root / name}: "
                    display.say(f"error: {place}{str(error).removeprefix(place)}")
                    continue
                display.say(f"{name}: {lines[1]}")
                for line in lines[2:]:
                    display.say(f"  {line}")
    moved = len(names) - failed - own
    display.say(f"{root}: {moved} of {len(names)} conversations moved to {opening.title}")
    if own:
        display.say(f"{own} were on this model already")
    if failed:
        display.say(f"{failed} failed, and stay as they were")
    return failed


def _rewrite(
    folder: Path, edits: Edits, foreign: ForeignMemory | None, parts: Parts, runner: asyncio.Runner
) -> list[str]:
    """Write the flashcards of one conversation anew and save it; returns the report.

    Raises as ``change`` does; then the folder stays as it is.
    """
    content, opening = _content(folder), parts.opening
    memory = content.memory(FastWeights(opening.basis.id, 0, {}))
    left_out = 0
    if not (foreign is None or foreign.same_weights or can_read(memory, parts)):
        memory, left_out = replace(memory, context_ids=(), context=""), len(memory.context_ids)
    require_fits(folder, len(memory.context_ids), opening)
    conversation = Conversation(parts, "memory", opening.system_prompt)
    cards = edits.applied(content.cards)

    async def write() -> Rebuilt:
        try:
            rebuilt = await conversation.rebuild(memory, content.cards, cards)
            conversation.save(folder, overwrite=True)
            return rebuilt
        finally:
            await conversation.close()

    lines = runner.run(write()).lines()
    if foreign is not None:
        lines = [f"{foreign.reason}: its flashcards were written anew", *lines]
    if left_out:
        lines += [f"{left_out} tokens of context are another tokenizer's: left out"]
    return lines


def _show_all(root: Path, names: Sequence[str], display: Display) -> None:
    display.say(f"{root}: {len(names)} saved conversation{'' if len(names) == 1 else 's'}")
    for name in names:
        try:
            content = _content(_kept(root, name))
            display.say(f"{name}: {_count(content)}, of {clean(content.model)}")
        except AssistantError as error:
            display.say(f"error: {error}")


def _count(content: MemoryContent) -> str:
    count = len(content.cards)
    return f"{count} flashcard{'' if count == 1 else 's'} in revision {content.revision}"


def _conversations(folder: Path) -> list[str]:
    """The names of the conversations that ``folder`` holds; none where it is one itself."""
    if (folder / MEMORY_FILE).exists():
        return []
    names = names_in(folder)
    return names if any((_kept(folder, name) / MEMORY_FILE).exists() for name in names) else []


def _kept(root: Path, name: str) -> Path:
    """The folder of a conversation; where its save was cut off, the one that is set aside meanwhile."""
    folder = root / name
    return folder if folder.exists() else root / f".{name}.old"


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
