"""The MCP servers of ``environment.mcp.servers``, checked.

    {shop: {command: [python, shop.py], env: [SHOP_KEY], tools: [price]}}   -->  ToolServer, over stdio
    {web: {url: http://127.0.0.1:8000/mcp, headers: {Authorization: WEB_KEY}}}  -->  ToolServer, over HTTP

Secrets never stand in the configuration, only the names of the environment variables that hold them: it is
saved, and logged. So messages name a key and never quote its value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from configs.bounds import BoundError

_KEYS = ("command", "env", "cwd", "url", "headers", "tools")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class ToolServer:
    """One server: ``command`` or ``url`` is given. ``tools`` empty: all that it has.

    ``env`` has names of environment variables, ``headers`` (header, name of an environment variable).
    """

    name: str
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = ""
    url: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    tools: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The server for people, as its setting writes it: without a secret."""
        return f"the MCP server {self.name} ({self.url or ' '.join(self.command)})"


def tool_servers(given: Mapping[str, object]) -> tuple[ToolServer, ...]:
    """The servers of ``environment.mcp.servers``. Raises BoundError."""
    return tuple(_server(str(name), content) for name, content in given.items())


def _server(name: str, content: object) -> ToolServer:
    if not isinstance(content, Mapping):
        raise _refused(name, "", "a mapping with command or url")
    for key in content:
        if key not in _KEYS:
            raise _refused(name, str(key)[:50], f"one of {', '.join(_KEYS)}")
    server = ToolServer(
        name,
        _texts(name, "command", content.get("command", ()), "a list of texts, e.g. [python, shop.py]"),
        _variables(name, content.get("env", ())),
        _text(name, "cwd", content.get("cwd", "")),
        _url(name, content.get("url", "")),
        _headers(name, content.get("headers", {})),
        _texts(name, "tools", content.get("tools", ()), "a list of names of tools"),
    )
    if bool(server.command) == bool(server.url):
        raise _refused(name, "", "a mapping with either command or url")
    if server.url and (server.env or server.cwd):
        raise _refused(name, "env" if server.env else "cwd", "left out with url: it is for a command")
    if server.command and server.headers:
        raise _refused(name, "headers", "left out with command: they are for a url")
    return server


def _texts(name: str, key: str, value: object, bound: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _refused(name, key, bound)
    if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in value):
        raise _refused(name, key, bound)
    return tuple(str(item) for item in value)


def _variables(name: str, value: object) -> tuple[str, ...]:
    bound = "a list of names of environment variables; the worker reads their values"
    names = _texts(name, "env", value, bound)
    if not all(_VARIABLE.fullmatch(each) for each in names):
        raise _refused(name, "env", bound)
    return names


def _headers(name: str, value: object) -> tuple[tuple[str, str], ...]:
    pairs = tuple((str(header), str(variable)) for header, variable in _mapping(value).items())
    if not isinstance(value, Mapping) or not all(_VARIABLE.fullmatch(variable) for _, variable in pairs):
        bound = "a mapping of a header to the name of an environment variable that holds its value"
        raise _refused(name, "headers", bound)
    return pairs


def _mapping(value: object) -> Mapping[object, object]:
    return value if isinstance(value, Mapping) else {}


def _text(name: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refused(name, key, "a text")
    return value


def _url(name: str, value: object) -> str:
    url = _text(name, "url", value)
    try:
        parts = urlsplit(url)
        usable = not url or (parts.scheme in ("http", "https") and bool(parts.hostname))
    except ValueError:
        usable = False
    if not usable:
        raise _refused(name, "url", "an address such as http://127.0.0.1:8000/mcp")
    if "@" in parts.netloc or "=" in re.sub(r"=\$[A-Za-z_]\w*", "", parts.query):
        raise _refused(name, "url", "without user, password or key: name a variable in headers, or $NAME")
    return url


def _refused(name: str, key: str, bound: str) -> BoundError:
    """The value is not shown: it may hold a secret."""
    return BoundError(f"servers.{name}{f'.{key}' if key else ''}", "...", bound)
