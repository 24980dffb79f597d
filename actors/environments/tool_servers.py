"""MCP servers that one episode talks to: over stdio, each a process of its own, or over HTTP.

    ToolServers.open --> a task that holds all connections --> the tools of all servers
    ToolServers.call --> what the tool gave, or that the server is gone (TaskError)
    ToolServers.close --> the task leaves its connections: a server's stdin closes, then it is killed

Why a task of its own: a connection must be left in the task that entered it, and each call of a session comes
in another. Secrets come from this process's environment. Where a server repeats one, the text says ***.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from actors.protocols import TaskError
from actors.text.tools import Tool
from configs.tool_servers import ToolServer

if TYPE_CHECKING:
    from mcp import Client

SETTING = "environment.mcp"
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")
_LEAST_SECRET = 6  # characters: a shorter value may be any word or number
_SHOWN = 300  # characters of a server's own words
_PAGES = 100  # of a list of tools: one that never ends is a fault


@dataclass(frozen=True, slots=True)
class ToolResult:
    text: str
    is_error: bool  # the tool itself says so


class ToolServers:
    """The servers of one session. Single-use; bound to the event loop of ``open``."""

    def __init__(self, servers: Sequence[ToolServer], timeout_s: float) -> None:
        self.tools: tuple[Tool, ...] = ()
        self._servers, self._timeout_s = servers, timeout_s
        self._owners: dict[str, tuple[ToolServer, Client]] = {}  # of each tool, by its name
        self._closing = asyncio.Event()
        self._holder: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start all servers and list their tools. Raises TaskError. What was opened is closed then."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._holder = asyncio.create_task(self._hold(opened))
        try:
            await asyncio.wait({opened, self._holder}, return_when=asyncio.FIRST_COMPLETED)
            if not opened.done():
                await self._holder
        except BaseException:
            await self.close()
            raise

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call a tool of ``tools``. Raises TaskError where its server is late or gone."""
        server, client = self._owners[name]
        holder = self._holder
        assert holder is not None, "open comes first"
        calling = asyncio.create_task(client.call_tool(name, dict(arguments)))
        try:
            # A server that is gone may end the holder, and leave the call waiting.
            waited = {calling, holder}
            await asyncio.wait(waited, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if calling.done():
                return _result(server, calling.result())
            late = not holder.done()
            self._refuse(server, f"its tool {name}", None if late else _error_of(holder), late)
        except Exception as error:
            if isinstance(error, TaskError):
                raise
            if (refusal := _refused_by_server(error)) is not None:
                return ToolResult(_hidden(server, refusal), is_error=True)
            self._refuse(server, f"its tool {name}", error, _is_late(error))
        finally:
            calling.cancel()

    async def close(self) -> None:
        """End all connections. The servers' own processes end with them."""
        self._closing.set()
        if self._holder is not None:
            if not self._owners:  # it still starts
                self._holder.cancel()
            await asyncio.wait({self._holder})
            if not self._holder.cancelled():
                self._holder.exception()  # whoever waited for the server has been told

    async def _hold(self, opened: asyncio.Future[None]) -> None:
        async with AsyncExitStack() as stack:
            found: list[Tool] = []
            owners: dict[str, tuple[ToolServer, Client]] = {}
            for server in self._servers:
                for tool, client in await self._start(server, stack):
                    if tool.name in owners:
                        others = f"{owners[tool.name][0].shown} and {server.shown}"
                        cure = f"name the wanted ones in {SETTING}.servers.{server.name}.tools"
                        raise TaskError(f"{others} both have a tool {tool.name}: {cure}")
                    found.append(tool)
                    owners[tool.name] = (server, client)
            self.tools, self._owners = tuple(found), owners
            opened.set_result(None)
            await self._closing.wait()

    async def _start(self, server: ToolServer, stack: AsyncExitStack) -> list[tuple[Tool, Client]]:
        """Connect and list the tools. Raises TaskError."""
        log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  the stack's
        stack.enter_context(log)
        inner = AsyncExitStack()
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                client = await _connected(server, log, self._timeout_s, inner)
                tools = await _listed(client)
        except Exception as error:
            with suppress(Exception):
                await inner.aclose()
            if isinstance(error, TaskError):
                raise
            self._refuse(server, "its start", error, deadline.expired(), _last_words(server, log))
        stack.push_async_exit(inner)
        return [(tool, client) for tool in _wanted(server, tools)]

    def _refuse(
        self, server: ToolServer, what: str, error: BaseException | None, late: bool, said: str = ""
    ) -> NoReturn:
        if late:
            late_by = f"{what} took longer than {SETTING}.timeout_s={self._timeout_s:g} s"
            raise TaskError(f"{server.shown}: {late_by}: raise it, or mend the server")
        cause = _hidden(server, _cause(error)) if error is not None else "the connection ended"
        words = f"; it said: {said}" if said else ""
        raise TaskError(f"{server.shown}: {what} failed: {cause}{words}") from None


async def _connected(server: ToolServer, log: IO[str], timeout_s: float, stack: AsyncExitStack) -> Client:
    import httpx2
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client
    from mcp.client.streamable_http import streamable_http_client

    # Its log has tracebacks with a server's own words, secrets included. A failed episode names the fault.
    logging.getLogger("mcp").setLevel(logging.CRITICAL)
    if server.url:
        headers = {header: _value_of(server, variable) for header, variable in server.headers}
        http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=timeout_s))
        transport = streamable_http_client(_filled(server, server.url), http_client=http)
        return await stack.enter_async_context(Client(transport, read_timeout_seconds=timeout_s))
    expanded = map(os.path.expanduser, server.command)
    command, *arguments = (_filled(server, part) for part in expanded)
    parameters = StdioServerParameters(
        command=command,
        args=arguments,
        env={name: _value_of(server, name) for name in server.env},
        cwd=os.path.expanduser(server.cwd) or None,  # noqa: PTH111
    )
    over_stdio = stdio_client(parameters, errlog=cast(Any, log))
    return await stack.enter_async_context(Client(over_stdio, read_timeout_seconds=timeout_s))


async def _listed(client: Client) -> list[Tool]:
    tools: list[Tool] = []
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += [Tool(tool.name, tool.description or "", dict(tool.input_schema)) for tool in page.tools]
        cursor = page.next_cursor
        if cursor is None:
            return tools
    raise ValueError(f"its list of tools has over {_PAGES} pages")


def _wanted(server: ToolServer, tools: Sequence[Tool]) -> list[Tool]:
    names = [tool.name for tool in tools]
    if missing := [name for name in server.tools if name not in names]:
        raise TaskError(f"{server.shown} has no tool {', '.join(missing)}; it has {', '.join(names)}")
    if not tools:
        raise TaskError(f"{server.shown} has no tools")
    return [tool for tool in tools if not server.tools or tool.name in server.tools]


def _result(server: ToolServer, result: Any) -> ToolResult:
    """What the model may read of a result: its texts."""
    parts = [_part(block) for block in result.content]
    return ToolResult(_hidden(server, "\n".join(parts)), bool(result.is_error))


def _part(block: Any) -> str:
    text = getattr(block, "text", None) or getattr(getattr(block, "resource", None), "text", None)
    return text if isinstance(text, str) else f"[{block.type}]"


# --- what went wrong ---------------------------------------------------------------------------------------


def _refused_by_server(error: Exception) -> str | None:
    """The server's own words where it lives and refuses the call; None for any other failure."""
    from mcp.shared.exceptions import MCPError
    from mcp.types import CONNECTION_CLOSED, REQUEST_TIMEOUT

    is_answer = isinstance(error, MCPError) and error.code not in (CONNECTION_CLOSED, REQUEST_TIMEOUT)
    return str(error) if is_answer else None


def _is_late(error: BaseException) -> bool:
    from mcp.shared.exceptions import MCPError
    from mcp.types import REQUEST_TIMEOUT

    return isinstance(error, TimeoutError) or (isinstance(error, MCPError) and error.code == REQUEST_TIMEOUT)


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


def _cause(error: BaseException) -> str:
    """The first cause in one line: what a group of errors holds."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:_SHOWN] or type(error).__name__


def _last_words(server: ToolServer, log: IO[str]) -> str:
    """The last line that the server wrote to stderr."""
    log.seek(0)
    lines = [line.strip() for line in log.read()[-(1 << 16) :].splitlines() if line.strip()]
    return _hidden(server, lines[-1])[:_SHOWN] if lines else ""


# --- secrets -----------------------------------------------------------------------------------------------


def _value_of(server: ToolServer, name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        cure = "set it where the rollout workers run"
        raise TaskError(f"{server.shown}: the environment variable {name} is not set: {cure}") from None


def _filled(server: ToolServer, text: str) -> str:
    return _VARIABLE.sub(lambda match: _value_of(server, match[1]), text)


def _hidden(server: ToolServer, text: str) -> str:
    """``text`` without the values of the variables that the server was given."""
    written = [*server.command, server.url]
    names = [*server.env, *(name for _, name in server.headers)]
    names += [name for part in written for name in _VARIABLE.findall(part)]
    values = {os.environ.get(name, "") for name in names}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _LEAST_SECRET:
            text = text.replace(value, "***")
    return text
