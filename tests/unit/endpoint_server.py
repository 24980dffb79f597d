"""A real HTTP server on loopback that plays scripted replies of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from actors.environments.judge import cached_endpoint

KEY = "sk-very-secret-0123456789"
Script = Callable[[dict[str, Any]], "Served"]


@dataclass(frozen=True)
class Served:
    """A scripted response. ``hold``: keep the connection, send nothing. ``drip``: send bytes without end."""

    status: int = 200
    body: str = ""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    hold: bool = False
    drip: bool = False
    delay_s: float = 0.0


@dataclass
class Server:
    """Plays its scripts in order, the last one for ever."""

    url: str
    scripts: list[Script]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def take(self, headers: dict[str, str], body: dict[str, Any]) -> Served:
        with self.lock:
            place = min(len(self.requests), len(self.scripts) - 1)
            self.requests.append(body)
            self.headers.append(headers)
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        return self.scripts[place](body)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served = server.take({name.lower(): value for name, value in self.headers.items()}, body)
            try:
                self._send(served)
            except OSError:  # the client gave up, as some tests want
                self.close_connection = True
            finally:
                with server.lock:
                    server.now -= 1

        def _send(self, served: Served) -> None:
            if served.hold:
                server.over.wait(30)
                self.close_connection = True
                return
            time.sleep(served.delay_s)
            data = served.body.encode()
            self.send_response(served.status)
            for name, value in served.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(10**6 if served.drip else len(data)))
            self.end_headers()
            while served.drip and not server.over.wait(0.02):
                self.wfile.write(b" ")
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serving() -> Iterator[Callable[..., Server]]:
    """Gives a function that starts a server of the given scripts; all of them end with the block."""
    running: list[tuple[ThreadingHTTPServer, Server]] = []

    def start(*scripts: Script) -> Server:
        server = Server("", list(scripts))
        http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        running.append((http, server))
        return server

    try:
        yield start
    finally:
        for http, server in running:
            server.over.set()
            http.shutdown()
            http.server_close()


def reached(monkeypatch: pytest.MonkeyPatch, key_variable: str) -> Iterator[Callable[..., Server]]:
    """``serving`` for a fixture: clients find the servers without a proxy, have KEY, and hardly pause."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv(key_variable, KEY)
    monkeypatch.setattr(cached_endpoint, "_FIRST_PAUSE_S", 0.01)
    with serving() as start:
        yield start


def completion(text: object, usage: object = None) -> Served:
    body = {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-1",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 50, "total_tokens": 250}
        if usage is None
        else usage,
    }
    return Served(body=json.dumps(body))


def error_reply(status: int, message: str = "", **headers: str) -> Script:
    body = json.dumps({"error": {"message": message, "type": "t", "code": "c"}})
    return lambda _: Served(status, body, (("Content-Type", "application/json"), *headers.items()))
