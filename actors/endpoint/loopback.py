"""One server of a process on 127.0.0.1, where a user's harness finds the policy. A key names the episode.

    harness --POST /v1/chat/completions, Bearer KEY--> Channel.ask ... waits
    episode's session --Channel.next_call--> Call;  --Channel.answer--> the waiting harness

Invariant: a channel answers one call at a time, in the order of the conversation (history.py). The server has
a thread and a loop of its own; channels live on that loop, and ``Loopback.on_loop`` is the way there.

Every wait, and who ends it: a call waits for its episode's answer, or for ``Channel.end``, which comes at the
latest when the episode is closed. ``next_call`` waits under the caller's deadline.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException

from actors.endpoint.answers import (
    Said,
    SaidCall,
    SaidChoice,
    completion,
    completion_events,
    error_body,
    models_body,
    usage,
)
from actors.endpoint.history import History, Message
from actors.endpoint.history import Said as Turn
from actors.endpoint.requests import Body, Neutral, RequestError, Text, bad_value, checked, only, read_json
from configs.environments import REPLACEABLE

T = TypeVar("T")
MODEL = "policy"
_MOST_BYTES = 64 * 2**20
_START_S = 30.0


class _Function(BaseModel):
    name: str = Field(min_length=1, description="a text")
    description: str | None = Field(None, description="a text")
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")


class _Tool(BaseModel):
    type: Literal["function"] = Field(description="function")
    function: _Function = Field(description="an object with name, description and parameters")


class _Body(Body):
    """A harness's call. A field that nobody knows is refused: it might change the answer."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    messages: list[Message] = Field(min_length=1, description="a list with one message or more")
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1)]] | None,
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = Field(None, description="a text or a list of texts, none of them empty")
    temperature: Neutral = None
    tools: list[_Tool] | None = Field(None, description="a list of functions")
    tool_choice: Annotated[object, only("auto")] = None
    parallel_tool_calls: Annotated[object, only(True)] = None
    # they change nothing in an answer
    user: object = None
    metadata: object = None
    store: object = None
    service_tier: object = None
    safety_identifier: object = None
    prompt_cache_key: object = None


@dataclass(frozen=True, slots=True)
class Call:
    """What a call brings to its episode. ``system_prompt``: of the first call of a conversation with one."""

    system_prompt: str | None
    turns: tuple[Turn, ...]  # new, of the user or of tools; the last one is to be answered
    tools: tuple[Mapping[str, Any], ...]  # name, description, parameters; the same in all calls of an episode
    max_tokens: int | None
    stop: tuple[str, ...]


Answered = tuple[Said, tuple[SaidCall, ...]]


@dataclass(slots=True)
class _Asked:
    """The newest call. ``gone`` tells whether its client waits no more."""

    said: list[Turn]
    reply: asyncio.Future[Answered]
    gone: Callable[[], Awaitable[bool]]
    lost: bool = False  # the reply came when nobody waited for it


class Channel:
    """The calls of one episode, for the server's loop."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.calls = 0
        self._history = History()
        self._queue: asyncio.Queue[Call | None] = asyncio.Queue()
        self._asked: _Asked | None = None
        self._tools: tuple[Mapping[str, Any], ...] | None = None  # of the first call
        self._over = ""  # why no call is answered any more

    async def ask(self, body: _Body, repeated: bool, gone: Callable[[], Awaitable[bool]]) -> Answered:
        """Return the policy's reply, with the tool calls in it. Raises RequestError.

        ``repeated``: the client says that it sends this call again. It gets the reply that it missed.
        """
        asked, said = self._asked, [message.said for message in body.messages]
        if asked is not None and asked.said == said:
            missed = asked.lost or (not asked.reply.done() and await asked.gone())
            if repeated or missed:
                asked.gone, asked.lost = gone, False
                return await self._wait(asked)
        if self._over:
            raise RequestError(410, self._over, None, "episode_over")
        if asked is not None and not asked.reply.done():
            message = "another call of this episode is being answered: parallel branches cannot be trained"
            raise RequestError(409, message, None, "history_conflict")
        tools = tuple(tool.function.model_dump() for tool in body.tools or ())
        if self._tools not in (None, tools):
            message = "tools must be the same in all calls of an episode: they stand in its prompt"
            raise RequestError(409, message, "tools", "history_conflict")
        new = self._history.accept(body.messages)
        self._tools = tools
        reply: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._asked = _Asked(said, reply, gone)
        self.calls += 1
        call = Call(new.system_prompt, new.turns, tools, body.most_tokens, tuple(body.stop or ()))
        self._queue.put_nowait(call)
        return await self._wait(self._asked)

    async def _wait(self, asked: _Asked) -> Answered:
        answered = await asyncio.shield(asked.reply)  # another handler may wait for it too
        asked.lost = await asked.gone()
        return answered

    async def next_call(self) -> Call | None:
        """The next call, None after ``finish``."""
        return await self._queue.get()

    async def answer(self, said: Said, calls: tuple[SaidCall, ...]) -> None:
        """Answer the newest call. ``calls``: the tool calls that the reply makes."""
        asked = self._asked
        assert asked is not None and not asked.reply.done(), "no call waits"
        self._history.reply(said.text, calls)
        asked.reply.set_result((said, calls))

    async def finish(self) -> None:
        """Let ``next_call`` return None behind the calls that have come: the harness makes no more."""
        self._queue.put_nowait(None)

    async def end(self, why: str) -> None:
        """Refuse the call that waits and all later ones."""
        self._over = self._over or why
        asked = self._asked
        if asked is not None and not asked.reply.done():
            asked.reply.set_exception(RequestError(410, self._over, None, "episode_over"))
            asked.reply.exception()  # its client may be gone: then nobody else would take it


class Loopback:
    """The server. It starts with the first ``open``, and lives as long as its process."""

    def __init__(self, ignored: Collection[str]) -> None:
        """``ignored``: fields of calls whose place the run's own sampling takes."""
        self._ignored = frozenset(ignored)
        self._channels: dict[str, Channel] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Listen, unless it does already. Blocks until calls are answered."""
        with self._lock:
            if self._loop is None:
                listening = socket.create_server(("127.0.0.1", 0))
                self._port = listening.getsockname()[1]
                self._loop = _serving(build_app(self._channels, self._ignored), listening)

    async def open(self) -> Channel:
        """A channel for one episode; its key opens it and no other."""
        await asyncio.to_thread(self.start)
        channel = await self.on_loop(_made(Channel, secrets.token_urlsafe(32)))
        self._channels[channel.key] = channel
        return channel

    async def close(self, channel: Channel) -> None:
        """End the channel: its key opens nothing any more."""
        self._channels.pop(channel.key, None)
        await self.on_loop(channel.end("the episode is over"))

    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await ``coroutine`` on the server's loop, from any loop."""
        assert self._loop is not None, "start comes first"
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def post(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start ``coroutine`` on the server's loop, from any thread."""
        assert self._loop is not None, "start comes first"
        asyncio.run_coroutine_threadsafe(coroutine, self._loop)


async def _made(kind: type[Channel], key: str) -> Channel:
    return kind(key)


def build_app(channels: dict[str, Channel], ignored: frozenset[str]) -> FastAPI:
    """The two routes of the protocol. ``channels`` by their keys."""
    app = FastAPI(title="Engram", openapi_url=None)

    def channel_of(request: Request) -> Channel:
        channel = channels.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if channel is None:
            message = "the bearer token names no episode that runs: use the api_key that it was given"
            raise RequestError(401, message, None, "invalid_api_key")
        return channel

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        channel_of(request)
        return JSONResponse(models_body(MODEL))

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        channel = channel_of(request)
        data = await read_json(request.headers.get("content-type", ""), request.stream(), _MOST_BYTES)
        body = _checked({key: data[key] for key in data if key not in ignored})
        # the official client's own count of its retries
        repeated = request.headers.get("x-stainless-retry-count", "0") != "0"
        said, calls = await channel.ask(body, repeated, request.is_disconnected)
        choice = SaidChoice(said.text, said.finish_reason, calls)
        name = body.model or MODEL  # a harness may have its own name for the one model that is here
        if body.stream:
            events = completion_events(name, choice, usage(said) if body.usage_in_stream else None, {})
            return StreamingResponse(events, media_type="text/event-stream")
        return Response(completion(name, [choice], usage(said), {}), media_type="application/json")

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestError):
            status, content = error.status, (error.message, error.param, error.code)
        else:
            assert isinstance(error, HTTPException)
            here = "only /v1/chat/completions and /v1/models are here"
            status, content = error.status_code, (f"{request.url.path}: {here}", None, "not_found")
        # what is refused is refused again: no client needs to try
        return JSONResponse(error_body(status, *content), status, {"x-should-retry": "false"})

    for kind in (RequestError, HTTPException):
        app.add_exception_handler(kind, refuse)
    return app


def _checked(data: Mapping[str, Any]) -> _Body:
    try:
        return checked(_Body, data)
    except RequestError as error:
        if error.param not in REPLACEABLE:
            raise
        cure = f"or let the run's own take its place: environment.harness.ignored_fields=[{error.param}]"
        raise bad_value(f"{error.message}, {cure}", error.param) from None


def _serving(app: FastAPI, listening: socket.socket) -> asyncio.AbstractEventLoop:
    """Serve ``app`` in a daemon thread; returns its loop."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    loop = asyncio.new_event_loop()
    serving = threading.Event()

    async def serve() -> None:
        loop.call_soon(serving.set)
        await server.serve(sockets=[listening])

    threading.Thread(target=lambda: loop.run_until_complete(serve()), name="loopback", daemon=True).start()
    if not serving.wait(_START_S):
        raise RuntimeError(f"the server for harnesses did not start within {_START_S:g} s")
    return loop
