"""The overwritten summary: a full context is read into a memory text that replaces the old one, and the context is cleared.

Method: MemAgent, arXiv 2507.02259. The wording is ours, and so is that an empty summary does not overwrite (it is counted).
"""

from __future__ import annotations

from actors.memory.base import Agent, ContextMemory
from configs.schema import MemoryConfig

_REWRITE = (
    "The text above will be erased, and so will your earlier notes. Write new notes that replace them: keep what is still useful of the earlier ones "
    "and add the facts that are new (who, what, when, where). Be brief."
)
_TASK = "The notes should help with: {question}"
_REMEMBERED = "Your notes on what came before:\n{summary}"


class SummaryMemory(ContextMemory):
    """The row "MemAgent"."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._summary = Summary(config)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        self.events[await self._summary.rewrite(agent)] += 1
        agent.clear(self._summary.remembered)


class Summary:
    """The memory text m of one episode, and how the agent rewrites it at the end of a full context."""

    def __init__(self, config: MemoryConfig) -> None:
        self.text = ""
        self._config = config

    @property
    def remembered(self) -> str:
        """The turn that the next context begins with; "" while there is no summary."""
        return _REMEMBERED.format(summary=self.text) if self.text else ""

    async def rewrite(self, agent: Agent) -> str:
        """Ask for the next text at the end of the running context. Returns what happened: "summaries" or "empty_summaries"."""
        agent.context.observe(agent.chat.user(self.prompt(agent)))
        text = (await agent.reply("extract", self._config.max_summary_tokens)).strip()
        self.text = text or self.text
        return "summaries" if text else "empty_summaries"

    def prompt(self, agent: Agent) -> str:
        if self._config.question_blind or not agent.question:
            return _REWRITE
        return f"{_REWRITE}\n{_TASK.format(question=agent.question)}"
