"""Judges that decide whether an answer meets its rubrics. One is an LLM behind an OpenAI-compatible endpoint.

    verdict(question, answer, rubrics)
      -> cache -> slot (max_concurrent) -> request -> parse -> Verdict
                                              ^
                                              +-- pause, again: up to ``retries`` times while it fails

Without a verdict there is a TaskError with the cause and the setting to change. The episode then fails and is
counted; it never scores 0.

Every wait, and what ends it:
    for a slot            another verdict that ends
    for the endpoint      ``timeout_s`` for a request, ``timeout_s * (retries + 1)`` for all requests of a
                          verdict and the pauses between them
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import diskcache
from diskcache.core import MODE_RAW, MODE_TEXT

from actors.environments.judge.endpoint import SETTING, Endpoint, EndpointFault, Reply
from actors.environments.judge.prompt import JudgePrompt, MalformedVerdictError, judge_prompt, parse_verdict
from actors.protocols import TaskError
from configs.schema import JudgeConfig

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0


@dataclass(frozen=True, slots=True)
class JudgeCost:
    """What verdicts cost. Tokens are as the endpoint reports them."""

    requests: int = 0  # HTTP requests, also those that failed or gave a malformed verdict
    cached: int = 0  # verdicts without a request
    unmetered: int = 0  # replies without a token count: tokens and usd leave them out
    prompt_tokens: int = 0
    generated_tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: JudgeCost) -> JudgeCost:
        return JudgeCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


NO_COST = JudgeCost()


@dataclass(frozen=True, slots=True)
class Verdict:
    """For each rubric, in order: is it met, and why ("" without a reason). ``cost`` is this verdict's own."""

    met: tuple[bool, ...]
    reasons: tuple[str, ...]
    cost: JudgeCost

    def __post_init__(self) -> None:
        if len(self.met) != len(self.reasons):
            raise ValueError(f"a verdict came with {len(self.met)} decisions and {len(self.reasons)} reasons")


class Judge(Protocol):
    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        """Decide each of ``rubrics``, at least one. Blocks; threads may call it at once. Raises TaskError."""
        ...


class EndpointJudge:
    """An LLM at ``config.url``, sampled greedily.

    The cache's key is model and prompt, without the url: a server may move to another port.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Sends nothing yet. Raises TaskError for a url, a key or a cache folder that cannot be used."""
        self._config = config
        self._endpoint = Endpoint(config)
        self._cache = _ReplyCache(config.cache_dir) if config.cache_dir else None
        self._slots = threading.BoundedSemaphore(config.max_concurrent)
        self._spent = NO_COST
        self._spent_lock = threading.Lock()

    @property
    def spent(self) -> JudgeCost:
        """The cost of all verdicts so far, failed ones too."""
        with self._spent_lock:
            return self._spent

    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        """See Judge. Runs its own event loop, so a coroutine must not call it."""
        prompt = judge_prompt(question, answer, rubrics)
        identity = json.dumps([self._config.model, prompt.system, prompt.user])
        key = hashlib.sha256(identity.encode()).hexdigest()
        cached = self._cached(key, prompt)
        if cached is not None:
            self._account(cached.cost)
            return cached
        costs: list[JudgeCost] = []
        with self._slots:
            try:
                reply = asyncio.run(self._reply(prompt, costs))
            finally:
                self._account(sum(costs, NO_COST))
        if self._cache is not None:
            self._cache.keep(key, reply)
        return Verdict(*parse_verdict(reply, prompt), sum(costs, NO_COST))

    def _cached(self, key: str, prompt: JudgePrompt) -> Verdict | None:
        reply = self._cache.find(key) if self._cache is not None else None
        if reply is None:
            return None
        try:
            return Verdict(*parse_verdict(reply, prompt), JudgeCost(cached=1))
        except MalformedVerdictError:  # cached by a version with another parser, or changed by hand
            return None

    async def _reply(self, prompt: JudgePrompt, costs: list[JudgeCost]) -> str:
        """A reply that is a verdict. Adds to ``costs``, also when it ends in TaskError."""
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
                    # The client's own timeout is for each byte: a server that drips bytes would never end.
                    async with asyncio.timeout_at(min(deadline, clock() + config.timeout_s)):
                        reply = await self._endpoint.ask(client, prompt.system, prompt.user_after(malformed))
                    costs.append(self._cost(reply))
                    parse_verdict(reply.text, prompt)
                    return reply.text
                except TimeoutError:
                    fault = self._endpoint.late()
                except MalformedVerdictError as error:
                    malformed = str(error)
                    cause, cure = f"gives no usable verdict: {malformed}", f"choose another {SETTING}.model"
                    fault = EndpointFault(cause, cure, may_pass=True, pause=0.0)
                except EndpointFault as error:
                    fault = error
                if not fault.may_pass:
                    break
                pause = _pause(number) if fault.pause is None else fault.pause
        requests = sum(costs, NO_COST).requests
        judge = f"the judge {config.model} at {self._endpoint.address}"
        raise TaskError(f"{judge} {fault.cause} (requests: {requests}): {fault.cure}")

    def _cost(self, reply: Reply) -> JudgeCost:
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
    """Seconds to wait after try ``number``: doubled each time, with jitter for tries that failed together."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**number) * random.uniform(0.75, 1.25)


class _TextDisk(diskcache.Disk):
    """Stores texts only.

    Why: diskcache pickles other values, and unpickles an entry that says it is a pickle. A cache folder may
    come from elsewhere, and a pickle can run code.
    """

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> Any:
        if not isinstance(value, str):
            raise TypeError(f"a text is stored, got {type(value).__name__}")
        return super().store(value, read, key=key)

    def get(self, key: Any, raw: Any) -> Any:
        if not raw or not isinstance(key, str):
            raise ValueError("its key is no text")
        return key

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode not in (MODE_RAW, MODE_TEXT):
            raise ValueError(f"its mode is {mode}, and texts have {MODE_RAW} or {MODE_TEXT}")
        return super().fetch(mode, filename, value, read)


class _ReplyCache:
    """A folder of replies by key: no verdict is paid for twice. Threads and processes may share it."""

    def __init__(self, folder: str) -> None:
        """Raises TaskError when the folder cannot be used."""
        self._folder = folder
        try:
            self._cache = diskcache.Cache(folder, disk=_TextDisk, eviction_policy="none")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def find(self, key: str) -> str | None:
        """The reply under ``key``; None without one, or for an entry that is no text. Raises TaskError."""
        try:
            reply = self._cache.get(key)
        except ValueError:
            return None
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            raise self._unusable(error) from None
        return reply if isinstance(reply, str) else None

    def keep(self, key: str, reply: str) -> None:
        """Raises TaskError."""
        try:
            self._cache.set(key, reply)
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> TaskError:
        cause = " ".join(str(error).split()) or type(error).__name__
        cure = f"change {SETTING}.cache_dir, or empty it"
        return TaskError(f"the folder {self._folder} cannot keep verdicts ({cause}): {cure}")
