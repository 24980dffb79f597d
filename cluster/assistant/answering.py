"""Answers one turn as its client asks: sampling settings, stop texts, several choices, text as it comes.

    prompt --Policy.speak, once for each choice--> tokens --> visible text so far --> Manner.heard
                                                         \\--> a stop text in it? the reply ends there

What is heard only grows, and is the beginning of the reply: what may still change (half a character, the
beginning of a stop text, of a tool call) is kept back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from actors.memory.base import ended_at
from actors.speech import Decoding, SpeakingPolicy, Spoken
from actors.text.tools import ToolCall, before_calls, overlap, readable_calls, surely_text
from actors.types import AdapterKey, FinishReason, Generation, Sampling

_HALF_A_CHARACTER = "\ufffd"


Heard = Callable[[int, str], None]
"""Gets the new text of a choice."""


def unheard(choice: int, text: str) -> None:
    pass


PLAINLY = Decoding()


@dataclass(frozen=True, slots=True)
class Manner:
    """How a turn is answered. ``stop`` texts end a reply before them. ``seed`` None: the conversation's own.

    ``tools``: the names of those that a reply may call. ``heard`` gets the new text of a choice.
    """

    decoding: Decoding = PLAINLY
    stop: tuple[str, ...] = ()
    seed: int | None = None
    choices: int = 1
    tools: tuple[str, ...] = ()
    heard: Heard = unheard

    @property
    def is_plain(self) -> bool:
        return self.decoding == PLAINLY and not self.stop and self.heard is unheard

    def calls_in(self, text: str) -> tuple[ToolCall, ...]:
        """The calls in a visible reply. One of a tool that the request does not allow makes it a text."""
        found = readable_calls(text, self.tools) if self.tools else ()
        return found if all(call.name in self.tools for call in found) else ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One reply to a turn. ``generation`` ends with its stop token or stop text; ``text`` has neither.

    ``told``: how many of its tokens come before a stop text. ``top``: see actors.speech.Spoken.
    """

    text: str
    generation: Generation
    told: int
    top: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def finish_reason(self) -> FinishReason:
        return self.generation.finish_reason


async def answers(
    policy: SpeakingPolicy,
    said: Callable[[Sequence[int]], str],
    prompt_ids: Sequence[int],
    sampling: Sampling,
    adapter: AdapterKey,
    manner: Manner,
) -> tuple[Choice, ...]:
    """Sample the choices of ``manner`` at the same time; ``said`` gives the text of a reply's tokens.

    Raises EngineError; then none goes on.
    """

    async def one(number: int) -> Choice:
        seed = sampling.seed if manner.seed is None else manner.seed
        own = replace(sampling, seed=seed + number)
        telling = _Telling(manner, number)

        def heard(ids: Sequence[int]) -> bool:
            return telling.hear(said(ids))

        if manner.is_plain:  # nobody hears its parts: vLLM tells of it once, as in an episode
            spoken = Spoken(await policy.generate(prompt_ids, own, adapter))
        else:
            spoken = await policy.speak(prompt_ids, own, adapter, manner.decoding, heard)
        whole = said(spoken.generation.token_ids)
        generation, text = ended_at(manner.stop, spoken.generation, whole, said)
        ids = generation.token_ids
        told = len(ids)
        while text != whole and told and said(ids[: told - 1]).startswith(text):
            told -= 1  # it says nothing but the stop text
        if generation.finish_reason == "length":
            text = text.rstrip(_HALF_A_CHARACTER)  # the other half is behind the bound
        telling.end(text)
        return Choice(text, generation, told, spoken.top[: len(ids)])

    tasks = [asyncio.create_task(one(number)) for number in range(manner.choices)]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class _Telling:
    """Tells the text of one choice as far as it is sure."""

    def __init__(self, manner: Manner, number: int) -> None:
        self._manner, self._number = manner, number
        self._told = ""

    def hear(self, text: str) -> bool:
        """Take the visible text so far. Returns whether a stop text is in it."""
        if any(end in text for end in self._manner.stop):
            return True  # ``end`` tells what stands before it
        sure = text.rstrip(_HALF_A_CHARACTER)
        unsure = max((overlap(sure, end) for end in self._manner.stop), default=0)
        sure = sure[: len(sure) - unsure]
        if self._manner.tools:
            sure = surely_text(sure, self._manner.tools)
        if sure.startswith(self._told):
            self._tell(sure)
        return False

    def end(self, text: str) -> None:
        """Take the whole text."""
        self._tell(before_calls(text) if self._manner.calls_in(text) else text)

    def _tell(self, text: str) -> None:
        # A thought that only its end shows to be one (an orphan </think>) may have been told already.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._told, text, strict=False)))
        if new := text[same:]:
            self._manner.heard(self._number, new)
        self._told = text
