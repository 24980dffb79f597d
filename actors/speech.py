"""What a client of ``serve`` asks of a reply and hears of it. No rollout uses any of this.

    Decoding --SpeakingPolicy.speak--> tokens as they come, to ``heard``; at the end what was Spoken

What the learner trains on is sampled plainly (protocols.Policy). A client may ask for more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.protocols import EngineError, Policy
from actors.types import AdapterKey, Generation, Sampling

Heard = Callable[[Sequence[int]], bool]
"""Gets all tokens of a reply so far, after each step. Returns whether the reply ends here."""


class RefusedError(EngineError):
    """The engine does not take a request as it is: a schema that it cannot keep to, a value out of range."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a reply is sampled, beside its Sampling. The default changes nothing.

    Log-probs are those of the tokens that top_p, top_k, min_p, penalties and a schema leave.
    Example: Decoding(top_p=0.9, json_schema='{"type": "object"}')
    """

    top_p: float = 1.0
    top_k: int = 0  # 0: of all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # by token id
    top_logprobs: int = 0  # how many of the likeliest tokens to tell at each place
    json_schema: str = ""  # JSON; the reply keeps to it


@dataclass(frozen=True, slots=True)
class Spoken:
    """What was sampled. ``top``: of each token the likeliest ones with their log-probs, the best first.

    Example: Spoken(Generation((504, 2), (-0.3, -0.1), "stop"), (((504, -0.3),), ((2, -0.1),)))
    """

    generation: Generation
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


class SpeakingPolicy(Policy, Protocol):
    """A policy that clients listen to."""

    async def speak(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        adapter: AdapterKey,
        decoding: Decoding,
        heard: Heard,
    ) -> Spoken:
        """Continue as ``generate`` does, under ``decoding``, and tell ``heard`` of every step.

        Raises EngineError; RefusedError where the engine cannot do as ``decoding`` asks.
        """
        ...
