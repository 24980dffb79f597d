"""A memory text that the agent overwrites.

MemAgent (arXiv 2507.02259)   a full context is read into a new memory text, and the context is cleared
MEM1 (arXiv 2506.15841)       the same after every turn: only the latest state is kept

The wording of the prompts is ours. An empty summary does not overwrite the old one; it is counted. MEM1
trains its model to write state and action in one reply. We ask for the state in a turn of its own, before
the next turn is read. So untrained models can be compared, in environments with their own answer format.
"""

from __future__ import annotations

from collections import Counter

from actors.memory.base import Agent, ContextMemory, turns_of
from configs.schema import MemoryConfig

_REWRITE = (
    "The text above will be erased, and so will your earlier notes. Write new notes that replace them: "
    "keep what is still useful of the earlier ones and add the facts that are new (who, what, when, where). "
    "Be brief."
)
_TASK = "The notes should help with: {question}"
_REMEMBERED = "Your notes on what came before:\n{summary}"


class Summary:
    """The memory text m of one episode. The agent rewrites it at the end of its context."""

    def __init__(self, config: MemoryConfig) -> None:
        self.text = ""
        self._config = config

    @property
    def remembered(self) -> str:
        """The turn that opens the next context; "" while there is no summary."""
        return _REMEMBERED.format(summary=self.text) if self.text else ""

    async def rewrite(self, agent: Agent) -> str:
        """Ask for a new text at the end of the running context. Return "summaries" or "empty_summaries"."""
        agent.context.observe(agent.chat.user(self.prompt(agent)))
        text = (await agent.reply("extract", self._config.max_summary_tokens)).strip()
        self.text = text or self.text
        return "summaries" if text else "empty_summaries"

    def reserve(self, agent: Agent, full: bool) -> int:
        """Return the tokens that a rewrite adds to the running context at most.

        ``full``: with a summary of full length in front of the context.
        """
        turn = agent.chat.user(self.prompt(agent)) + agent.chat.assistant_open
        front = len(agent.chat.user(_REMEMBERED)) + self._config.max_summary_tokens if full else 0
        return len(turn) + self._config.max_summary_tokens + len(agent.chat.assistant_close(())) + front

    def prompt(self, agent: Agent) -> str:
        return rewrite_prompt("" if self._config.question_blind else agent.question)


def rewrite_prompt(question: str) -> str:
    """The prompt that asks for a new summary. A question-blind memory passes ""."""
    return f"{_REWRITE}\n{_TASK.format(question=question)}" if question else _REWRITE


class SummaryMemory(ContextMemory):
    """The row "MemAgent"."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._summary = Summary(config)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        if self.cleared_without_news(agent, self._summary.remembered):
            return
        self.events[await self._summary.rewrite(agent)] += 1
        agent.clear(self._summary.remembered)


class StateMemory:
    """The row "MEM1". Each turn is moved into the state before the next turn comes."""

    def __init__(self, config: MemoryConfig) -> None:
        self.events: Counter[str] = Counter()
        self._limit = config.max_context_tokens
        self._state = Summary(config)

    async def read(self, agent: Agent, text: str) -> None:
        for turn in turns_of(text, agent.turn, self._limit):
            await self._consolidate(agent)
            agent.context.observe(turn)
        await self._consolidate(agent)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        await self._consolidate(agent)
        agent.context.observe(agent.turn(text))
        return await agent.reply("act", max_tokens)

    async def _consolidate(self, agent: Agent) -> None:
        if agent.context.is_fresh:
            return
        self.events[await self._state.rewrite(agent)] += 1
        agent.clear(self._state.remembered)
