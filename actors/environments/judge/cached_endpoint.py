"""Asks a model behind an OpenAI-compatible endpoint until its reply can be used, and keeps what it replied.

    answer(prompt, read)
      -> cache -> slot (max_concurrent) -> request -> read -> Answered
                                             ^
                                             +-- pause, again: up to ``retries`` times while it fails

Every wait, and what ends it:
    for a slot            another answer that ends
    for the endpoint      ``timeout_s`` for a request, ``timeout_s * (retries + 1)`` for all requests of an
                          answer and the pauses between them
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import diskcache
from diskcache.core import MODE_RAW, MODE_TEXT

from actors.environments.judge.endpoint import Endpoint, EndpointFault, Reply
from actors.protocols import TaskError
from configs.schema import EndpointConfig

T = TypeVar("T")
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0


class MalformedReplyError(ValueError):
    """The model's reply cannot be used. The message says what it lacks: "it has no JSON array"."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request. Its reply should be ``wanted``, "JSON list"."""

    system: str
    user: str
    wanted: str

    def user_after(self, fault: str) -> str:
        """The user turn of the next try, after a malformed reply; ``fault`` is "" when there was none."""
        if not fault:
            return self.user
        again = f"An earlier reply could not be used: {fault}. Reply with the {self.wanted} only."
        return f"{self.user}\n\n{again}"


@dataclass(frozen=True, slots=True)
class Cost:
    """What answers cost. Tokens are as the endpoint reports them."""

    requests: int = 0  # HTTP requests, also those that failed or gave a malformed reply
    cached: int = 0  # answers without a request
    unmetered: int = 0  # replies without a token count: tokens and usd leave them out
    prompt_tokens: int = 0
    generated_tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


NO_COST = Cost()


@dataclass(frozen=True, slots=True)
class Answered(Generic[T]):
    """What was read out of a reply, and this answer's own cost."""

    value: T
    cost: Cost


@dataclass(frozen=True, slots=True)
class Role:
    """How messages speak of the endpoint: ``setting`` "environment.rubric.judge", ``name`` "the judge".

    ``gives`` is what its reply should be, in the singular, ``keeps`` what the cache holds.
    """

    setting: str
    name: str
    gives: str
    keeps: str


class CachedEndpoint:
    """A model at ``config.url``, sampled greedily.

    The cache's key is model and prompt, without the url: a server may move to another port.
    """

    def __init__(self, config: EndpointConfig, role: Role) -> None:
        """Sends nothing yet. Raises TaskError for a url, a key or a cache folder that cannot be used."""
        self._config = config
        self._role = role
        self._endpoint = Endpoint(config, role.setting)
        self._cache = _ReplyCache(config.cache_dir, role) if config.cache_dir else None
        self._slots = threading.BoundedSemaphore(config.max_concurrent)
        self._spent = NO_COST
        self._spent_lock = threading.Lock()

    @property
    def spent(self) -> Cost:
        """The cost of all answers so far, failed ones too."""
        with self._spent_lock:
            return self._spent

    def require_listening(self) -> None:
        """Raise TaskError when nobody listens at the address and nothing was kept of an earlier run."""
        if self._cache is None or self._cache.is_empty:
            try:
                self._endpoint.require_listening()
            except TaskError as error:
                raise TaskError(f"{self._role.name} {self._config.model} at {error}") from None

    def answer(self, prompt: Prompt, read: Callable[[str], T]) -> Answered[T]:
        """Return what ``read`` makes of the model's reply; ``read`` raises MalformedReplyError.

        Blocks; threads may call it at once. Runs its own event loop, so a coroutine must not call it. Raises
        TaskError with the cause and the setting to change.
        """
        identity = json.dumps([self._config.model, prompt.system, prompt.user])
        key = hashlib.sha256(identity.encode()).hexdigest()
        cached = self._cached(key, read)
        if cached is not None:
            self._account(cached.cost)
            return cached
        costs: list[Cost] = []
        with self._slots:
            try:
                reply = asyncio.run(self._reply(prompt, read, costs))
            finally:
                self._account(sum(costs, NO_COST))
        if self._cache is not None:
            self._cache.keep(key, reply)
        return Answered(read(reply), sum(costs, NO_COST))

    def _cached(self, key: str, read: Callable[[str], T]) -> Answered[T] | None:
        reply = self._cache.find(key) if self._cache is not None else None
        if reply is None:
            return None
        try:
            return Answered(read(reply), Cost(cached=1))
        except MalformedReplyError:  # cached by a version with another parser, or changed by hand
            return None

    async def _reply(self, prompt: Prompt, read: Callable[[str], object], costs: list[Cost]) -> str:
        """A reply that can be read. Adds to ``costs``, also when it ends in TaskError."""
        config, clock = self._config, asyncio.get_running_loop().time
        fault, malformed, pause = self._endpoint.late(), "", 0.0
        async with self._endpoint.client() as client:
            deadline = clock() + config.timeout_s * (config.retries + 1)
            for number in range(config.retries + 1):
                if clock() + pause >= deadline:
                    break
                await asyncio.sleep(pause)
                costs.append(Cost(requests=1))
                try:
                    # The client's own timeout is for each byte: a server that drips bytes would never end.
                    async with asyncio.timeout_at(min(deadline, clock() + config.timeout_s)):
                        reply = await self._endpoint.ask(client, prompt.system, prompt.user_after(malformed))
                    costs.append(self._cost(reply))
                    read(reply.text)
                    return reply.text
                except TimeoutError:
                    fault = self._endpoint.late()
                except MalformedReplyError as error:
                    malformed = str(error)
                    cause = f"gives no usable {self._role.gives}: {malformed}"
                    cure = f"choose another {self._role.setting}.model"
                    fault = EndpointFault(cause, cure, may_pass=True, pause=0.0)
                except EndpointFault as error:
                    fault = error
                if not fault.may_pass:
                    break
                pause = _pause(number) if fault.pause is None else fault.pause
        requests = sum(costs, NO_COST).requests
        whom = f"{self._role.name} {config.model} at {self._endpoint.address}"
        raise TaskError(f"{whom} {fault.cause} (requests: {requests}): {fault.cure}")

    def _cost(self, reply: Reply) -> Cost:
        config = self._config
        if reply.prompt_tokens is None or reply.generated_tokens is None:
            return Cost(unmetered=1)
        dollars = (
            reply.prompt_tokens * config.usd_per_million_prompt_tokens
            + reply.generated_tokens * config.usd_per_million_generated_tokens
        )
        return Cost(
            prompt_tokens=reply.prompt_tokens, generated_tokens=reply.generated_tokens, usd=dollars / 1e6
        )

    def _account(self, cost: Cost) -> None:
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
    """A folder of replies by key: nothing is paid for twice. Threads and processes may share it."""

    def __init__(self, folder: str, role: Role) -> None:
        """Raises TaskError when the folder cannot be used."""
        self._folder, self._role = folder, role
        try:
            self._cache = diskcache.Cache(folder, disk=_TextDisk, eviction_policy="none")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    @property
    def is_empty(self) -> bool:
        return len(self._cache) == 0

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
        cure = f"change {self._role.setting}.cache_dir, or empty it"
        return TaskError(f"the folder {self._folder} cannot keep {self._role.keeps} ({cause}): {cure}")
