"""What a client has to show before it is asked for a key: whole headers, soon and not too long, and a Host.

    connection --Protocol--> headers within HEADERS_S, of at most HEADER_BYTES --HostCheck--> the app

A page from the web can make a browser call a local server under a name of its own (DNS rebinding). So the
name in Host must be one that cannot be rebound, or one that the user allows.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import socket
from collections.abc import Sequence
from typing import ClassVar

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from actors.endpoint.answers import error_body

HEADERS_S = 20.0
HEADER_BYTES = 64 * 1024
MOST_SILENT = 256
"""Connections that have not sent a whole request yet. One more closes the oldest of them."""


class Protocol(H11Protocol):
    """HTTP/1.1 for clients that may be slow or hostile: a connection must bring its headers in time."""

    _silent: ClassVar[dict[asyncio.Transport, float]] = {}  # deadlines, those of the whole process

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._silent.pop(self.transport, None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._silent.pop(self.transport, None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self._await_headers()

    def _await_headers(self) -> None:
        self._silent.pop(self.transport, None)  # so that the oldest comes first
        self._silent[self.transport] = self.loop.time() + HEADERS_S
        if len(self._silent) > MOST_SILENT:
            oldest = next(iter(self._silent))
            del self._silent[oldest]  # now: its connection is lost only later, and the next one counts them
            oldest.abort()
        self.loop.call_later(HEADERS_S, self._close_if_late)

    def _close_if_late(self) -> None:
        if self._silent.get(self.transport, math.inf) <= self.loop.time():
            self.transport.abort()


class HostCheck:
    """Refuses a Host that is no address, not this machine, and not among ``allowed``."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = {"localhost", socket.gethostname().lower(), *(name.lower() for name in allowed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = (value.decode("latin-1") for name, value in scope["headers"] if name == b"host")
            given = next(hosts, "")
            if not self._is_allowed(_without_port(given).lower()):
                await _refuse(send, given)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, name: str) -> bool:
        try:
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return name in self._allowed or name.endswith(".localhost")


class HeadAsGet:
    """Answers HEAD as GET: health checks send it. The server leaves the body out (H11Protocol)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


async def _refuse(send: Send, given: str) -> None:
    message = f"the host {given[:100]!r} is not known here: add it to assistant.hosts"
    body = json.dumps(error_body(421, message, None, "unknown_host")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 421, "headers": headers})
    await send({"type": "http.response.body", "body": body})
