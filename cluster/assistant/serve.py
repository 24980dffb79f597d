"""An OpenAI-compatible endpoint where each conversation owns its memory. The app is openai_format.py and sessions.py behind five routes.

    client --POST /v1/chat/completions--> size, key, JSON checked --> Sessions.turn --> Conversation.say --> JSON, or one server-sent event

Every failure is an error in OpenAI's form. Every request ends by ``assistant.request_timeout_s``; a turn that is cut off then is undone.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from actors.protocols import EngineError, ReceiptError, WriterError
from cluster.assistant.conversation import Conversation
from cluster.assistant.openai_format import (
    Answer,
    ChatRequest,
    RequestError,
    check_name,
    completion,
    completion_events,
    describe_writes,
    error_body,
    parse_request,
)
from cluster.assistant.opening import parts_of
from cluster.assistant.sessions import BusyError, Sessions
from cluster.assistant.values import AssistantError, Opening, Parts
from cluster.common.display import Display

KEY_VARIABLE = "ENGRAM_API_KEY"
_GRACE_S = 30


def serve(opening: Opening, host: str, port: int, display: Display) -> None:
    """Serve until Ctrl-C or SIGTERM, then put all conversations away. Raises AssistantError for an address that cannot be had, EngineError."""
    import uvicorn

    key = os.environ.get(KEY_VARIABLE, "")
    listening = _listen(host, port)
    slots = opening.config.engine.slots
    with listening, parts_of(opening, slots) as parts:
        app = build_app(parts, Sessions(parts, slots), key)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_S, access_log=False)
        )
        display.say(
            f"serving {model_name(opening)} on http://{_shown(host)}:{listening.getsockname()[1]}/v1 (Ctrl-C ends)"
        )
        if not key and not _is_loopback(host):
            display.say(
                f"warning: {host} is reached from other machines and {KEY_VARIABLE} is not set: whoever reaches it can read conversations"
            )
        with _signals_end_quietly():
            server.run(sockets=[listening])
    for problem in app.state.unsaved:
        display.say(f"error: a conversation is lost: {problem}")
    display.say(
        "ended"
        + (
            f"; conversations are in {opening.config.assistant.save_dir}"
            if opening.config.assistant.save_dir
            else ""
        )
    )


def model_name(opening: Opening) -> str:
    """What clients call it: a hub's name, else the last part of the path."""
    title = opening.title.rstrip("/")
    return title if title == opening.base_model else title.rpartition("/")[2]


def build_app(parts: Parts, sessions: Sessions, key: str) -> FastAPI:
    """``key``: what a bearer must show; "" asks for none."""
    name, settings = model_name(parts.opening), parts.opening.config.assistant

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.unsaved = []
        yield
        app.state.unsaved = await sessions.close()

    app = FastAPI(title="Engram", openapi_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        failure = parts.failure()
        state = {"status": "dead" if failure else "ok", "model": name, "conversations": len(sessions)}
        return JSONResponse(state | ({"reason": failure} if failure else {}), 503 if failure else 200)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _authorize(request, key)
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "engram"}]}
        )

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        _authorize(request, key)
        async with asyncio.timeout(settings.request_timeout_s):
            asked = await _read(request, parts, name, settings.max_body_kib * 1024)
            answer = await _answer(asked, sessions)
        if asked.stream:
            return StreamingResponse(
                completion_events(name, answer, asked.usage_in_stream), media_type="text/event-stream"
            )
        return JSONResponse(completion(name, answer))

    @app.get("/v1/conversations/{conversation}")
    async def look(conversation: str, request: Request) -> Response:
        _authorize(request, key)
        found = sessions.look(check_name(conversation, "conversation"))
        if found is None:
            raise RequestError(
                404, f"conversation {conversation} is not in memory", "conversation", "not_found"
            )
        state = {
            "id": conversation,
            "revision": found.revision,
            "context_tokens": found.context_tokens,
            "writes": describe_writes(found.writes),
        }
        return JSONResponse(state)

    @app.delete("/v1/conversations/{conversation}")
    async def forget(conversation: str, request: Request) -> Response:
        _authorize(request, key)
        if not await sessions.forget(check_name(conversation, "conversation")):
            raise RequestError(404, f"there is no conversation {conversation}", "conversation", "not_found")
        return JSONResponse({"id": conversation, "deleted": True})

    _add_errors(app, settings.request_timeout_s)
    return app


async def _answer(asked: ChatRequest, sessions: Sessions) -> Answer:
    async with sessions.turn(asked.conversation, asked.system_prompt) as (conversation, new):
        if asked.system_prompt is not None and asked.system_prompt != conversation.system_prompt:
            raise RequestError(
                400,
                "the conversation began with another system message: leave it out, or name a new one",
                "messages",
                "invalid_value",
            )
        before = len(conversation.writes)
        conversation.temperature = asked.temperature
        if new:
            await _catch_up(asked, conversation)
        for text in asked.turns[:-1]:
            await conversation.read(text)
        reply = await conversation.say(asked.turns[-1], asked.max_tokens)
        return Answer(asked.conversation, new, reply, conversation.writes[before:])


async def _catch_up(asked: ChatRequest, conversation: Conversation) -> None:
    for turn in asked.history:
        await (conversation.read(turn.text) if turn.role == "user" else conversation.said(turn.text))


async def _read(request: Request, parts: Parts, name: str, most: int) -> ChatRequest:
    """Raises RequestError. Only JSON: a web page in a browser on this machine cannot send that here without being asked first, which is refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the Content-Type must be application/json", None, "unsupported_media_type")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise RequestError(
                413, f"the body is over {most} bytes (assistant.max_body_kib)", None, "body_too_large"
            )
    asked = parse_request(bytes(body), request.headers.get("x-conversation-id"), parts.opening.config)
    if asked.model != name:
        raise RequestError(
            404,
            f"the model {asked.model[:100]!r} is not served here; {name!r} is",
            "model",
            "model_not_found",
        )
    if failure := parts.failure():
        raise RequestError(503, f"the engine is dead ({failure}): start the server anew", None, "engine_dead")
    return asked


def _authorize(request: Request, key: str) -> None:
    shown = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(shown.encode(), key.encode()):
        raise RequestError(401, "the bearer token is missing or wrong", None, "invalid_api_key")


def _add_errors(app: FastAPI, limit_s: float) -> None:
    def respond(status: int, message: str, param: str | None, code: str) -> JSONResponse:
        return JSONResponse(error_body(status, message, param, code), status)

    async def wrong(request: Request, error: Any) -> Response:
        return respond(error.status, error.message, error.param, error.code)

    async def unknown(request: Request, error: Any) -> Response:
        return respond(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", None, "not_found"
        )

    async def busy(request: Request, error: Exception) -> Response:
        return respond(429, str(error), None, "too_many_conversations")

    async def late(request: Request, error: Exception) -> Response:
        return respond(
            504,
            f"no answer within {limit_s:g} s (assistant.request_timeout_s); the turn is undone",
            None,
            "timeout",
        )

    async def broken(request: Request, error: Exception) -> Response:
        return respond(500, " ".join(str(error).split())[:500], None, type(error).__name__)

    app.add_exception_handler(RequestError, wrong)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(BusyError, busy)
    app.add_exception_handler(TimeoutError, late)
    for kind in (AssistantError, EngineError, ReceiptError, WriterError):
        app.add_exception_handler(kind, broken)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise AssistantError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port or --host"
        ) from error


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn ends at SIGINT and SIGTERM, and then raises them again: by then everything is put away, and nobody needs to be killed."""
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


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
