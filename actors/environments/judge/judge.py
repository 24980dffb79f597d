"""Who decides whether an answer meets its rubrics, and a judge that is an LLM behind an OpenAI-compatible endpoint.

    verdict(question, answer, rubrics) -> cache -> a place (max_concurrent) -> request -> parse -> Verdict
                                                             ^-- pause -- again, while it fails or is malformed, up to ``retries`` times

A verdict that cannot be had is a TaskError, one line with the cause and the setting to change: the episode fails and is counted, it never scores 0.
Waits: for a place (freed when another verdict ends), then for the endpoint: each request at most ``timeout_s``, all requests of a verdict and the
pauses between them together at most ``timeout_s * (retries + 1)``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from actors.environments.judge.cache import ReplyCache
from actors.environments.judge.endpoint import SETTING, Endpoint, EndpointFault, Reply
from actors.environments.judge.prompt import JudgePrompt, MalformedVerdictError, judge_prompt, parse_verdict
from actors.protocols import TaskError
from configs.schema import JudgeConfig

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0


@dataclass(frozen=True, slots=True)
class JudgeCost:
    """What verdicts took. ``requests`` counts every HTTP request, failed and malformed ones too; ``cached`` the verdicts that needed none.

    Tokens are those that the endpoint reported; ``unmetered`` replies came without a report, so that tokens and ``usd`` leave them out.
    """

    requests: int = 0
    cached: int = 0
    unmetered: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: JudgeCost) -> JudgeCost:
        return JudgeCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


NO_COST = JudgeCost()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether each rubric is met, and why ("" where no reason was given), in the rubrics' order; and what it took to find out."""

    met: tuple[bool, ...]
    reasons: tuple[str, ...]
    cost: JudgeCost

    def __post_init__(self) -> None:
        if len(self.met) != len(self.reasons):
            raise ValueError(f"a verdict came with {len(self.met)} decisions and {len(self.reasons)} reasons")


class Judge(Protocol):
    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        """One decision for each of ``rubrics`` (at least one). Blocks; called from many threads at once. Raises TaskError, one line."""
        ...


class EndpointJudge:
    """An LLM at ``config.url``, greedy. Kept replies are keyed by model and prompt, not by the endpoint: a server may move to another port."""

    def __init__(self, config: JudgeConfig) -> None:
        """Sends nothing yet. Raises TaskError for a url, a key or a cache folder that cannot be used."""
        self._config = config
        self._endpoint = Endpoint(config)
        self._cache = ReplyCache(config.cache_dir) if config.cache_dir else None
        self._places = threading.BoundedSemaphore(config.max_concurrent)
        self._spent = NO_COST
        self._spent_lock = threading.Lock()

    @property
    def spent(self) -> JudgeCost:
        """Everything so far, verdicts that failed included."""
        with self._spent_lock:
            return self._spent

    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        """See Judge. Runs an event loop of its own, so not to be called from a coroutine."""
        prompt = judge_prompt(question, answer, rubrics)
        key = hashlib.sha256(
            json.dumps([self._config.model, prompt.system, prompt.user]).encode()
        ).hexdigest()
        kept = self._kept(key, prompt)
        if kept is not None:
            self._account(kept.cost)
            return kept
        costs: list[JudgeCost] = []
        with self._places:
            try:
                reply = asyncio.run(self._reply(prompt, costs))
            finally:
                self._account(sum(costs, NO_COST))
        if self._cache is not None:
            self._cache.keep(key, reply)
        return Verdict(*parse_verdict(reply, prompt), sum(costs, NO_COST))

    def _kept(self, key: str, prompt: JudgePrompt) -> Verdict | None:
        reply = self._cache.find(key) if self._cache is not None else None
        if reply is None:
            return None
        try:
            return Verdict(*parse_verdict(reply, prompt), JudgeCost(cached=1))
        except MalformedVerdictError:  # kept by a version with another parser, or changed by hand: ask again
            return None

    async def _reply(self, prompt: JudgePrompt, costs: list[JudgeCost]) -> str:
        """A reply that is a verdict; what it took is added to ``costs``, also when it ends in TaskError."""
        config, clock = self._config, asyncio.get_running_loop().time
        fault, malformed, pause = self._endpoint.late(), "", 0.0
        async with self._endpoint.client() as client:
            deadline = clock() + config.timeout_s * (config.retries + 1)
            for number in range(config.retries + 1):
                if clock() + pause >= deadline:
                    break
                await asyncio.sleep(pause)
                costs.append(JudgeCost(requests=1))
                try:
                    async with asyncio.timeout_at(min(deadline, clock() + config.timeout_s)):
                        reply = await self._endpoint.ask(client, prompt.system, prompt.user_after(malformed))
                    costs.append(self._metered(reply))
                    parse_verdict(reply.text, prompt)
                    return reply.text
                except TimeoutError:
                    fault = self._endpoint.late()
                except MalformedVerdictError as error:
                    malformed = str(error)
                    fault = EndpointFault(
                        f"gives no usable verdict: {malformed}",
                        f"choose another {SETTING}.model",
                        again=True,
                        pause=0.0,
                    )
                except EndpointFault as error:
                    fault = error
                if not fault.again:
                    break
                pause = _pause(number) if fault.pause is None else fault.pause
        requests = sum(costs, NO_COST).requests
        where = f"the judge {config.model} at {self._endpoint.address}"
        raise TaskError(f"{where} {fault.cause} (requests: {requests}): {fault.cure}")

    def _metered(self, reply: Reply) -> JudgeCost:
        config = self._config
        if reply.prompt_tokens is None or reply.generated_tokens is None:
            return JudgeCost(unmetered=1)
        dollars = (
            reply.prompt_tokens * config.usd_per_million_prompt_tokens
            + reply.generated_tokens * config.usd_per_million_generated_tokens
        )
        return JudgeCost(
            prompt_tokens=reply.prompt_tokens, generated_tokens=reply.generated_tokens, usd=dollars / 1e6
        )

    def _account(self, cost: JudgeCost) -> None:
        with self._spent_lock:
            self._spent += cost


def _pause(number: int) -> float:
    """Seconds before try ``number`` + 1: doubled each time, a little apart for those that failed together."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**number) * random.uniform(0.75, 1.25)
