"""An OpenAI-compatible endpoint where each conversation owns its memory.

    connection --> headers, Host (connections.py) --> key --> body (routes.py) --> turn (turns.py)

Every failure is an error in OpenAI's form. Every request ends by ``assistant.request_timeout_s``. A turn that
is cut off then, or whose client has gone, is undone.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from actors.endpoint.requests import RequestError
from cluster.assistant.completions import add_completions
from cluster.assistant.connections import HEADER_BYTES, HeadAsGet, HostCheck, Protocol
from cluster.assistant.metrics import Counting, Metrics
from cluster.assistant.opening import AssistantError, Opening, Parts, is_hub_name, parts_of
from cluster.assistant.responses import add_responses
from cluster.assistant.routes import (
    Service,
    add_chat,
    add_conversations,
    add_errors,
    add_memories,
    add_models,
)
from cluster.assistant.sessions import Sessions
from cluster.common.display import Display

KEY_VARIABLE = "ENGRAM_API_KEY"
_GRACE_S = 30


def serve(opening: Opening, host: str, port: int, display: Display) -> None:
    """Serve until Ctrl-C or SIGTERM, then put all conversations away.

    Raises AssistantError for an address that cannot be listened on, and EngineError.
    """
    import uvicorn

    key = os.environ.get(KEY_VARIABLE, "")
    listening = _listen(host, port)
    slots = opening.config.engine.slots
    with listening, parts_of(opening, slots) as parts:
        app = build_app(parts, Sessions(parts, slots), key, host)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=Protocol,
                h11_max_incomplete_event_size=HEADER_BYTES,
                log_config=None,  # its own would write where libraries do (common/quiet.py)
                log_level="warning",
                timeout_graceful_shutdown=_GRACE_S,
                access_log=False,
            )
        )
        display.say(
            f"serving {model_name(opening)} on http://{_in_url(host)}:{listening.getsockname()[1]}/v1 "
            "(Ctrl-C ends)"
        )
        if not key and not _is_loopback(host):
            display.say(
                f"warning: other machines reach {host} and {KEY_VARIABLE} is not set: "
                "anyone who reaches it can read conversations"
            )
        with _signals_end_quietly():
            server.run(sockets=[listening])
    for problem in app.state.unsaved:
        display.say(f"error: a conversation is lost: {problem}")
    save_dir = opening.config.assistant.save_dir
    display.say(f"ended; conversations are in {save_dir}" if save_dir else "ended")


def model_name(opening: Opening) -> str:
    """The name for clients: a hub's name, else the last part of the path."""
    title = opening.title.rstrip("/")
    return title if is_hub_name(title) else title.rpartition("/")[2]


def build_app(parts: Parts, sessions: Sessions, key: str, host: str = "127.0.0.1") -> FastAPI:
    """All routes. ``key`` is the bearer token that clients must show; "" asks for none."""
    name, settings = model_name(parts.opening), parts.opening.config.assistant
    metrics = Metrics(lambda: len(sessions), lambda: not parts.failure())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.unsaved = []
        yield
        app.state.unsaved = await sessions.close()

    async def authorize(request: Request) -> None:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(shown.encode(), key.encode()):
            raise RequestError(401, "the bearer token is missing or wrong", None, "invalid_api_key")

    app = FastAPI(title="Engram", openapi_url=None, lifespan=lifespan)
    service = Service(name, parts, sessions, metrics)
    protected = APIRouter(dependencies=[Depends(authorize)])
    add_models(protected, name)
    add_chat(protected, service)
    add_responses(protected, service)
    add_completions(protected, service)
    add_conversations(protected, service)
    add_memories(protected, service)
    _add_state(app, protected, service)
    app.include_router(protected)
    add_errors(app, settings.request_timeout_s)
    app.add_middleware(Counting, metrics=metrics)
    app.add_middleware(HeadAsGet)
    app.add_middleware(HostCheck, allowed=(host, *settings.hosts))
    return app


def _add_state(app: FastAPI, protected: APIRouter, service: Service) -> None:
    """``/health`` is for everybody; ``/metrics`` needs the key."""

    @app.get("/health")
    async def health() -> Response:
        failure = service.parts.failure()
        state: dict[str, object] = {
            "status": "dead" if failure else "ok",
            "model": service.name,
            "conversations": len(service.sessions),
        }
        if failure:
            state["reason"] = failure
        if service.sessions.unsaved:
            state["unsaved"] = len(service.sessions.unsaved)
        return JSONResponse(state, 503 if failure else 200)

    @protected.get("/metrics")
    async def figures() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise AssistantError(
            f"cannot listen on {host}:{port} ({reason}); choose another --port or --host"
        ) from error


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Ignore the signal that uvicorn raises again after its end: by then every conversation is put away."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
