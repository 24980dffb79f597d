"""The routes of ``serve`` and their errors.

    POST /v1/chat/completions            an answer in a conversation, whole or as it comes
    POST /v1/responses, /v1/completions  in files of their own
    GET  /v1/models, /v1/models/ID       the one model that is here
    GET  /v1/conversations               those in memory and on the disk
    GET, DELETE /v1/conversations/ID     one of them: show it, forget it
    GET, PATCH /v1/conversations/ID/memory  its flashcards: list them; correct or forget some

All of them need the key, if there is one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from actors.endpoint.answers import error_body, model_body, models_body
from actors.endpoint.requests import RequestError, bad_value, client_gone, read_json
from cluster.assistant.conversation import Conversation
from cluster.assistant.memory_file import ForeignMemory
from cluster.assistant.metrics import Metrics
from cluster.assistant.openai_answers import Answer, completion, completion_events, summarize
from cluster.assistant.openai_format import ChatRequest, check_name, parse_request
from cluster.assistant.opening import AssistantError, Parts
from cluster.assistant.saved import FullError
from cluster.assistant.sessions import BusyError, Sessions
from cluster.assistant.streaming import GoneError, Hear, Stream, unless_gone
from cluster.assistant.tending import edit_memory, memory_body
from cluster.assistant.turns import FAILURES, answer
from configs.files import dump_json

_EVENTS = "text/event-stream"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """What the routes share. ``name`` is the model's for clients."""

    name: str
    parts: Parts
    sessions: Sessions
    metrics: Metrics

    def deadline(self) -> asyncio.Timeout:
        """A context that ends with a TimeoutError when a request's time is over."""
        return asyncio.timeout(self.parts.opening.config.assistant.request_timeout_s)

    async def body(self, request: Request) -> dict[str, Any]:
        """A JSON object that a client sends. Raises RequestError."""
        limit = self.parts.opening.config.assistant.max_body_kib * 1024
        if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            message = f"the Content-Encoding {coding[:100]!r} is not read here: send the body as it is"
            raise RequestError(415, message, None, "unsupported_media_type")
        kind = request.headers.get("content-type", "")
        return await read_json(kind, request.stream(), limit, "assistant.max_body_kib")

    async def find(self, name: str) -> Conversation:
        """The conversation of a path, in memory or on the disk. Raises RequestError."""
        conversation = await self.sessions.open(check_name(name, "conversation"))
        if conversation is None:
            raise _unknown(name)
        return conversation

    async def read(self, request: Request) -> dict[str, Any]:
        """The body of a request to the model. Raises RequestError."""
        async with self.deadline():
            data = await self.body(request)
        if not isinstance(model := data.get("model"), str):
            raise bad_value(f"model must be a text: {self.name!r} is served here", "model")
        if model != self.name:
            message = f"the model {model[:100]!r} is not served here; {self.name!r} is"
            raise RequestError(404, message, "model", "model_not_found")
        if failure := self.parts.failure():
            message = f"the engine is dead ({failure}): start the server anew"
            raise RequestError(503, message, None, "engine_dead")
        return data

    def events(self, events: AsyncIterator[str], stream: Stream[Any]) -> Response:
        limit_s = self.parts.opening.config.assistant.request_timeout_s
        return StreamingResponse(_guarded(events, stream, limit_s), media_type=_EVENTS)

    async def chat(self, request: Request, asked: ChatRequest) -> Stream[Answer]:
        """Begin to answer what is ``asked``, and wait until there is something to send."""

        def turn(hear: Hear) -> Coroutine[Any, Any, Answer]:
            return answer(asked, self.parts, self.sessions, self.metrics, hear)

        return await self.begin(request, turn, asked.stream)

    async def begin(
        self, request: Request, work: Callable[[Hear], Coroutine[Any, Any, T]], streamed: bool | None
    ) -> Stream[T]:
        """Start ``work`` and wait for its first text, or for its end. It is given up if its client goes."""
        stream = Stream(work)
        try:
            if streamed:
                await unless_gone(request, stream.first())
            else:
                await unless_gone(request, stream.whole())
        except BaseException:
            stream.leave()
            raise
        return stream


def named_by(request: Request) -> str | None:
    """The header that names a conversation."""
    return request.headers.get("x-conversation-id")


def add_models(routes: APIRouter, name: str) -> None:
    @routes.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(models_body(name))

    @routes.get("/v1/models/{wanted:path}")
    async def model(wanted: str) -> Response:
        if wanted != name:
            message = f"the model {wanted[:100]!r} is not served here; {name!r} is"
            raise RequestError(404, message, "model", "model_not_found")
        return JSONResponse(model_body(name))


def add_chat(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        data = await service.read(request)
        asked = parse_request(data, named_by(request), service.parts.opening.config)
        stream = await service.chat(request, asked)
        if asked.stream:
            return service.events(completion_events(service.name, asked, stream), stream)
        content = completion(service.name, await stream.whole())
        return Response(content, media_type="application/json")


def add_memories(routes: APIRouter, service: Service) -> None:
    @routes.get("/v1/conversations/{name}/memory")
    async def memory(name: str) -> Response:
        async with service.deadline():
            listed = memory_body(await service.find(name))
        return JSONResponse({"id": name} | listed)

    @routes.patch("/v1/conversations/{name}/memory")
    async def tend(name: str, request: Request) -> Response:
        async with service.deadline():
            data = await service.body(request)
            await service.find(name)
            async with service.sessions.turn(name, None) as (conversation, _):
                try:
                    tended = await edit_memory(conversation, data)
                except AssistantError as error:
                    raise bad_value(str(error), None) from error
        return JSONResponse({"id": name} | tended)


def add_conversations(routes: APIRouter, service: Service) -> None:
    sessions = service.sessions

    @routes.get("/v1/conversations")
    async def every(request: Request) -> Response:
        limit, after = request.query_params.get("limit", ""), request.query_params.get("after", "")
        if not re.fullmatch(r"[1-9][0-9]{0,8}|", limit):
            raise bad_value("limit must be a whole number, 1 or more", "limit")
        behind = [(name, here) for name, here in sorted(sessions.names().items()) if name > after]
        page = behind[: int(limit or len(behind))]
        held = [{"id": name, "in_memory": here} for name, here in page]
        ends = (
            {"first_id": page[0][0], "last_id": page[-1][0]} if page else {"first_id": None, "last_id": None}
        )
        more = {"has_more": len(page) < len(behind)}
        return JSONResponse({"object": "list", "data": held, **ends, **more})

    @routes.get("/v1/conversations/{name}")
    async def look(name: str) -> Response:
        async with service.deadline():
            conversation = await service.find(name)
        state = {
            "id": name,
            "revision": conversation.revision,
            "context_tokens": conversation.context_tokens,
            "writes": [summarize(record) for record in conversation.writes],
        }
        return Response(dump_json(state, indent=None), media_type="application/json")

    @routes.delete("/v1/conversations/{name}")
    async def forget(name: str) -> Response:
        if not await sessions.forget(check_name(name, "conversation")):
            raise _unknown(name)
        return JSONResponse({"id": name, "deleted": True})


def _unknown(name: str) -> RequestError:
    return RequestError(404, f"there is no conversation {name}", "conversation", "not_found")


async def _guarded(events: AsyncIterator[str], stream: Stream[Any], limit_s: float) -> AsyncIterator[str]:
    """The events of an answer. A failure is one more event; a client that goes away ends the turn."""
    try:
        async for event in events:
            yield event
    except (RequestError, *FAILURES) as error:
        # The status is sent already.
        status, message, param, code = _described(error, limit_s)
        yield f"data: {dump_json(error_body(status, message, param, code), indent=None)}\n\n"
    finally:
        stream.leave()


def add_errors(app: FastAPI, limit_s: float) -> None:
    async def respond(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            message = f"{request.method} {request.url.path}: {error.detail}"
            allowed = _methods(app, request) if error.status_code == 405 else ()
            told = {"Allow": ", ".join(allowed)} if allowed else {}
            code = "method_not_allowed" if allowed else "not_found"
            body = error_body(error.status_code, message, None, code)
            return JSONResponse(body, error.status_code, told)
        status, message, param, code = _described(error, limit_s)
        return JSONResponse(error_body(status, message, param, code), status)

    for kind in (RequestError, HTTPException, GoneError, *FAILURES):
        app.add_exception_handler(kind, respond)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What may be done at the path of a request."""
    found = (getattr(route, "methods", None) for route in app.routes if route.matches(request.scope)[0].value)
    methods = {method for some in found for method in some or ()}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _described(error: Exception, limit_s: float) -> tuple[int, str, str | None, str]:
    """(status, message, param, code) of a failure."""
    match error:
        case RequestError(status=status, message=message, param=param, code=code):
            return status, message, param, code
        case GoneError():
            return _described(client_gone(), limit_s)
        case BusyError():
            return 429, str(error), None, "too_many_conversations"
        case ForeignMemory():
            return 409, str(error), "conversation", "foreign_memory"
        case FullError():
            return 507, str(error), None, "no_room_for_conversations"
        case TimeoutError():
            message = f"no answer within {limit_s:g} s (assistant.request_timeout_s); the turn is undone"
            return 504, message, None, "timeout"
        case _:
            return 500, " ".join(str(error).split())[:500], None, type(error).__name__
