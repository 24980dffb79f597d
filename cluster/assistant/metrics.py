"""What ``serve`` counts, for Prometheus: GET /metrics.

The names follow vLLM's where it has the same figure: engram:time_to_first_token_seconds for
vllm:time_to_first_token_seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.types import WriteRecord
from cluster.assistant.conversation import Reply

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server. ``conversations`` and ``alive`` are asked at each reading."""

    def __init__(self, conversations: Callable[[], float], alive: Callable[[], bool]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "engram:requests", "Requests by route and HTTP status.", ["route", "status"], registry=registry
        )
        self._tokens = Counter(
            "engram:tokens", "Tokens of prompts and of replies.", ["kind"], registry=registry
        )
        self._writes = Counter(
            "engram:writes", "Writes into fast weights by outcome.", ["outcome"], registry=registry
        )
        self._write_seconds = Histogram(
            "engram:write_seconds", "Time of a write.", buckets=_SECONDS, registry=registry
        )
        self._first_token = Histogram(
            "engram:time_to_first_token_seconds",
            "From a request to the first text of its stream.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "engram:request_seconds", "Time of an answered turn.", buckets=_SECONDS, registry=registry
        )
        self._running = Gauge("engram:turns_running", "Turns that run or wait.", registry=registry)
        held = Gauge("engram:conversations", "Conversations in memory that have a name.", registry=registry)
        held.set_function(conversations)
        up = Gauge("engram:engine_alive", "1 while the engine serves.", registry=registry)
        up.set_function(lambda: float(alive()))

    def text(self) -> bytes:
        """All figures in Prometheus's text form."""
        return generate_latest(self._registry)

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def timer(self) -> Timer:
        return Timer(self._first_token, self._seconds, self._running)

    def counted(self, prompt_tokens: int, reply_tokens: int) -> None:
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("reply").inc(reply_tokens)

    def answered(self, reply: Reply, writes: Sequence[WriteRecord]) -> None:
        self.counted(reply.prompt_tokens, reply.reply_tokens)
        for record in writes:
            self._writes.labels(record.outcome).inc()
            if record.outcome != "empty":
                self._write_seconds.observe(record.seconds)


class Counting:
    """Counts every response by its route. By the route's path: a client may make up any other."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other").replace(":path}", "}")
                self._metrics.request(path, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


class Timer:
    """The clock of one turn, as a context. Single-use."""

    def __init__(self, first_token: Histogram, seconds: Histogram, running: Gauge) -> None:
        self._first_token, self._seconds, self._running = first_token, seconds, running
        self._began = time.perf_counter()
        self._heard = False

    def __enter__(self) -> Timer:
        self._running.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._running.dec()
        if kind is None:
            self._seconds.observe(time.perf_counter() - self._began)

    def first_token(self) -> None:
        if not self._heard:
            self._heard = True
            self._first_token.observe(time.perf_counter() - self._began)
