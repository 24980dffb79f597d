"""An OpenAI-compatible endpoint where each conversation owns its memory.

    POST chat/completions --> check key, size, JSON --> Sessions.turn --> Conversation.say --> JSON or events

Every failure is an error in OpenAI's form. Every request ends by ``assistant.request_timeout_s``, and a turn
that is cut off then is undone.
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

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from actors.endpoint.answers import error_body, models_body
from actors.endpoint.requests import RequestError, read_json
from actors.protocols import EngineError, ReceiptError, WriterError
from cluster.assistant.openai_format import (
    Answer,
    ChatRequest,
    check_name,
    completion,
    completion_events,
    parse_request,
    summarize,
)
from cluster.assistant.opening import AssistantError, Opening, Parts, parts_of
from cluster.assistant.saved import FullError
from cluster.assistant.sessions import BusyError, Sessions
from cluster.common.display import Display
from configs.files import dump_json

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
        app = build_app(parts, Sessions(parts, slots), key)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
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
    return title if title == opening.base_model else title.rpartition("/")[2]


def build_app(parts: Parts, sessions: Sessions, key: str) -> FastAPI:
    """The five routes. ``key`` is the bearer token that clients must show; "" asks for none."""
    limit_s = parts.opening.config.assistant.request_timeout_s

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
    protected = APIRouter(prefix="/v1", dependencies=[Depends(authorize)])
    _add_completions(protected, parts, sessions)
    _add_conversations(protected, sessions)
    _add_health(app, parts, sessions)
    app.include_router(protected)
    _add_errors(app, limit_s)
    return app


def _add_health(app: FastAPI, parts: Parts, sessions: Sessions) -> None:
    name = model_name(parts.opening)

    @app.get("/health")
    async def health() -> Response:
        failure = parts.failure()
        state = {"status": "dead" if failure else "ok", "model": name, "conversations": len(sessions)}
        unsaved = {"unsaved": len(sessions.unsaved)} if sessions.unsaved else {}
        return JSONResponse(
            state | unsaved | ({"reason": failure} if failure else {}), 503 if failure else 200
        )


def _add_completions(routes: APIRouter, parts: Parts, sessions: Sessions) -> None:
    name, limit_s = model_name(parts.opening), parts.opening.config.assistant.request_timeout_s

    @routes.get("/models")
    async def models() -> Response:
        return JSONResponse(models_body(name))

    @routes.post("/chat/completions")
    async def complete(request: Request) -> Response:
        async with asyncio.timeout(limit_s):
            chat_request = await _read(request, parts)
            answer = await _answer(chat_request, sessions)
        if chat_request.stream:
            events = completion_events(name, answer, chat_request.usage_in_stream)
            return StreamingResponse(events, media_type="text/event-stream")
        return Response(completion(name, answer), media_type="application/json")


def _add_conversations(routes: APIRouter, sessions: Sessions) -> None:
    @routes.get("/conversations/{name}")
    async def look(name: str) -> Response:
        conversation = sessions.look(check_name(name, "conversation"))
        if conversation is None:
            raise RequestError(404, f"conversation {name} is not in memory", "conversation", "not_found")
        state = {
            "id": name,
            "revision": conversation.revision,
            "context_tokens": conversation.context_tokens,
            "writes": [summarize(record) for record in conversation.writes],
        }
        return Response(dump_json(state, indent=None), media_type="application/json")

    @routes.delete("/conversations/{name}")
    async def forget(name: str) -> Response:
        if not await sessions.forget(check_name(name, "conversation")):
            raise RequestError(404, f"there is no conversation {name}", "conversation", "not_found")
        return JSONResponse({"id": name, "deleted": True})


async def _read(request: Request, parts: Parts) -> ChatRequest:
    """Read and check the body. Raises RequestError."""
    config = parts.opening.config
    kind, limit = request.headers.get("content-type", ""), config.assistant.max_body_kib * 1024
    data = await read_json(kind, request.stream(), limit, "assistant.max_body_kib")
    chat_request = parse_request(data, request.headers.get("x-conversation-id"), config)
    name = model_name(parts.opening)
    if chat_request.model != name:
        message = f"the model {chat_request.model[:100]!r} is not served here; {name!r} is"
        raise RequestError(404, message, "model", "model_not_found")
    if failure := parts.failure():
        raise RequestError(503, f"the engine is dead ({failure}): start the server anew", None, "engine_dead")
    return chat_request


async def _answer(request: ChatRequest, sessions: Sessions) -> Answer:
    async with sessions.turn(request.conversation, request.system_prompt) as (conversation, new):
        if request.system_prompt is not None and request.system_prompt != conversation.system_prompt:
            raise RequestError(
                400,
                "the conversation began with another system message: leave it out, or name a new one",
                "messages",
                "invalid_value",
            )
        before = len(conversation.writes)
        conversation.temperature = request.temperature
        if new:  # an older one has the history in its context or in its weights
            for message in request.history:
                take_in = conversation.read if message.role == "user" else conversation.said
                await take_in(message.content)
        for text in request.turns[:-1]:
            await conversation.read(text)
        reply = await conversation.say(request.turns[-1], request.max_tokens)
        return Answer(request.conversation, new, reply, conversation.writes[before:])


def _add_errors(app: FastAPI, limit_s: float) -> None:
    async def respond(request: Request, error: Exception) -> Response:
        param: str | None = None
        match error:
            case RequestError(status=status, message=message, param=param, code=code):
                pass
            case HTTPException(status_code=status, detail=detail):
                message, code = f"{request.method} {request.url.path}: {detail}", "not_found"
            case BusyError():
                status, message, code = 429, str(error), "too_many_conversations"
            case FullError():
                status, message, code = 507, str(error), "no_room_for_conversations"
            case TimeoutError():
                message = f"no answer within {limit_s:g} s (assistant.request_timeout_s); the turn is undone"
                status, code = 504, "timeout"
            case _:
                status, message, code = 500, " ".join(str(error).split())[:500], type(error).__name__
        return JSONResponse(error_body(status, message, param, code), status)

    refusals = (RequestError, HTTPException, BusyError, FullError, TimeoutError)
    for kind in (*refusals, AssistantError, EngineError, ReceiptError, WriterError):
        app.add_exception_handler(kind, respond)


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
