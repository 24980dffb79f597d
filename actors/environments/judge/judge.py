"""Judges that decide whether an answer meets its rubrics. One is an LLM behind an OpenAI-compatible endpoint.

    verdict(question, answer, rubrics) --> judge_prompt --> CachedEndpoint --> parse_verdict --> Verdict

Without a verdict there is a TaskError with the cause and the setting to change. The episode then fails and is
counted; it never scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from actors.environments.judge.cached_endpoint import CachedEndpoint, Cost, Role
from actors.environments.judge.prompt import judge_prompt, parse_verdict
from configs.schema import JudgeConfig

_ROLE = Role("environment.rubric.judge", "the judge", "verdict", "verdicts")


@dataclass(frozen=True, slots=True)
class Verdict:
    """For each rubric, in order: is it met, and why ("" without a reason). ``cost`` is this verdict's own."""

    met: tuple[bool, ...]
    reasons: tuple[str, ...]
    cost: Cost

    def __post_init__(self) -> None:
        if len(self.met) != len(self.reasons):
            raise ValueError(f"a verdict came with {len(self.met)} decisions and {len(self.reasons)} reasons")


class Judge(Protocol):
    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        """Decide each of ``rubrics``, at least one. Blocks; threads may call it at once. Raises TaskError."""
        ...


class EndpointJudge:
    """An LLM at ``config.url``, sampled greedily."""

    def __init__(self, config: JudgeConfig) -> None:
        """Sends nothing yet. Raises TaskError for a url, a key or a cache folder that cannot be used."""
        self._endpoint = CachedEndpoint(config, _ROLE)

    @property
    def spent(self) -> Cost:
        """The cost of all verdicts so far, failed ones too."""
        return self._endpoint.spent

    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        """See Judge. Runs its own event loop, so a coroutine must not call it."""
        prompt = judge_prompt(question, answer, rubrics)
        answered = self._endpoint.answer(prompt, partial(parse_verdict, prompt=prompt))
        return Verdict(*answered.value, answered.cost)
