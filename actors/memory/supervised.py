"""Writes that are supervised by other texts than flashcards. Each write clears the context.

raw            the transcript itself, next token by next token (test-time training, after arXiv 2407.04620)
summary_write  the agent's own summary of the context
implications   what follows from each document that is read, one line each (after SEAL, arXiv 2506.10943,
               without its outer loop of RL over edits)
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.memory.base import Agent, ContextMemory
from actors.memory.summary import Summary
from actors.text.chat_template import ChatFormat, Ids
from actors.text.split_text import split_text
from actors.types import WriteExample
from configs.schema import MemoryConfig, WriteConfig

_RECALL = "What do you remember of what you have read?"
_IMPLY = (
    "The text above will be erased. List what it says and what follows from it, directly or indirectly: "
    "one short, complete sentence on each line, each understandable without the text."
)
_MARKS = " \t-*\u2022"  # in front of a list's lines


class RawMemory(ContextMemory):
    """The row "raw next-token": trains on the tokens of the context as they are.

    They come in pieces of write.max_example_tokens, each after the system prompt.
    """

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._write = write

    async def relieve(self, agent: Agent, incoming: int) -> None:
        if self.cleared_without_news(agent):
            return
        read = agent.context.after_opening
        agent.clear()
        opening = agent.chat.system(agent.system_prompt)
        await _learn(agent, "", text_examples(opening, [read], self._write), self._write)


class SummaryWriteMemory(ContextMemory):
    """The row "summary SFT": the summary is written into the weights and does not stay in the context."""

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._config = config
        self._write = write

    async def relieve(self, agent: Agent, incoming: int) -> None:
        if self.cleared_without_news(agent):
            return
        summary = Summary(self._config)
        self.events[await summary.rewrite(agent)] += 1
        agent.clear()
        examples = summary_examples(agent.chat, agent.system_prompt, summary.text, self._write)
        await _learn(agent, summary.text, examples, self._write)


class ImplicationsMemory(ContextMemory):
    """The row "SEAL-like": each text that is read is a document and has its own write.

    Questions and answers stay in the context until it is full.
    """

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._config = config
        self._write = write

    async def read(self, agent: Agent, text: str) -> None:
        await super().read(agent, text)
        if not agent.context.is_fresh:
            await self.relieve(agent, 0)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        if self.cleared_without_news(agent):
            return
        agent.context.observe(agent.chat.user(_IMPLY))
        text = await agent.reply("extract", self._config.max_extract_tokens)
        agent.clear()
        lines = dict.fromkeys(line.strip(_MARKS) for line in text.splitlines())
        turns = [agent.chat.user(line) for line in lines if line]  # trained on like texts that are read
        self.events["implications"] += len(turns)
        opening = agent.chat.system(agent.system_prompt)
        turns = [agent.chat.join(opening, turn) for turn in turns]
        await _learn(agent, text, text_examples(opening, turns, self._write), self._write)


def summary_examples(
    chat: ChatFormat, system_prompt: str, summary: str, write: WriteConfig
) -> list[WriteExample]:
    """Return ``summary`` as the agent's reply to the question what it remembers, in pieces that fit."""
    prompt = chat.opening(system_prompt, _RECALL) + chat.assistant_open
    room = _room(prompt, write)
    pieces = split_text(summary, lambda piece: len(chat.reply(piece)), room) if summary and room > 1 else []
    return [WriteExample(prompt, chat.reply(piece)) for piece in pieces if piece.strip()]


def text_examples(opening: Ids, texts: Sequence[Ids], write: WriteConfig) -> list[WriteExample]:
    """Return examples with loss on every token of ``texts``, in pieces that fit behind ``opening``."""
    room = _room(opening, write)
    if room < 1:
        return []
    return [
        WriteExample(opening, ids[start : start + room])
        for ids in texts
        for start in range(0, len(ids), room)
    ]


def _room(prompt: Ids, write: WriteConfig) -> int:
    return write.max_example_tokens - len(prompt)


async def _learn(agent: Agent, text: str, examples: Sequence[WriteExample], write: WriteConfig) -> None:
    if write.epochs == 0:
        agent.skip_write(text, 0, "write.epochs=0: T is the identity")
    elif examples:
        await agent.write(text, (), examples, 0)
    elif not text.strip():
        agent.skip_write(text, 0, "the model wrote nothing")
    else:
        agent.skip_write(text, 0, f"nothing fits write.max_example_tokens={write.max_example_tokens}")
