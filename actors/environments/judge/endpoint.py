"""Sends a request to an OpenAI-compatible endpoint, and puts each failure into words.

The key is read once, from the environment variable that the config names. It stands in the request's header
only, never in a log or a message. A server that refuses the key may repeat it, so its words are not shown.
"""

from __future__ import annotations

import math
import os
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from actors.protocols import TaskError
from configs.hub import unreachable
from configs.schema import EndpointConfig

if TYPE_CHECKING:
    import openai

_NO_KEY = "none"  # sent when the variable is not set: local servers need no key, but the client does
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Reply:
    """The model's text, and the endpoint's token counts; None where it gives none."""

    text: str
    prompt_tokens: int | None
    generated_tokens: int | None


class EndpointFault(RuntimeError):
    """A request failed.

    ``may_pass``: another try may help. ``pause``: the seconds that the endpoint asks to wait before it.
    """

    def __init__(self, cause: str, cure: str, may_pass: bool, pause: float | None = None) -> None:
        super().__init__(cause, cure)
        self.cause, self.cure, self.may_pass, self.pause = cause, cure, may_pass, pause


class Endpoint:
    """A model's server. ``address`` is safe to show: it has no user, password or query."""

    def __init__(self, config: EndpointConfig, setting: str) -> None:
        """``setting``: where the configuration has ``config``, for messages. Sends nothing yet.

        Raises TaskError for a url or a key that cannot be used.
        """
        self.address = _address(config.url, setting)
        self._config = config
        self._setting = setting
        self._key = _key(config.api_key_env, setting)
        self._certificates = ssl.create_default_context()  # slow, so once: the system's, or SSL_CERT_FILE's

    def client(self) -> openai.AsyncOpenAI:
        """A client for one event loop, to be closed on that loop. It does not retry by itself."""
        import openai

        return openai.AsyncOpenAI(
            api_key=self._key or _NO_KEY,
            base_url=self._config.url,
            timeout=self._config.timeout_s,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(verify=self._certificates),
        )

    async def ask(self, client: openai.AsyncOpenAI, system: str, user: str) -> Reply:
        """Send one request, sampled greedily. Raises EndpointFault."""
        import openai

        try:
            completion = await client.chat.completions.create(
                model=self._config.model,
                temperature=0,
                messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
            )
        except (openai.OpenAIError, ValueError) as error:  # ValueError: the body is not JSON
            raise self._fault(error) from None
        reply = _reply(completion)
        if reply is None:
            raise self.no_protocol()
        return reply

    def require_listening(self) -> None:
        """Raise TaskError when nobody listens at the address. Takes seconds at most, and sends nothing."""
        if reason := unreachable(self.address):
            cure = f"start it, or change {self._setting}.url"
            raise TaskError(f"{self.address} is unreachable ({reason}): {cure}")

    def late(self) -> EndpointFault:
        """The fault of a request that took too long."""
        return EndpointFault(
            f"gave no answer in {self._config.timeout_s:g} s",
            f"look after its server, or raise {self._setting}.timeout_s",
            may_pass=True,
        )

    def _fault(self, error: Exception) -> EndpointFault:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return self.late()
        if isinstance(error, openai.APIConnectionError):
            return EndpointFault(
                f"is unreachable ({self._safe(_root_cause(error))})",
                f"start it, or change {self._setting}.url",
                may_pass=True,
            )
        if isinstance(error, openai.APIStatusError):
            return self._refusal(
                error.status_code, error.message, _retry_after(error.response.headers.get("retry-after", ""))
            )
        return self.no_protocol()

    def no_protocol(self) -> EndpointFault:
        """The fault of a reply that is none of the OpenAI protocol."""
        cause, cure = "does not speak the OpenAI protocol", f"change {self._setting}.url (most end in /v1)"
        return EndpointFault(cause, cure, may_pass=True)

    def _refusal(self, status: int, message: str, pause: float | None) -> EndpointFault:
        reason = f"{status}: {self._safe(message)}"
        if status in (401, 403):
            return EndpointFault(f"refuses the key ({status})", self._key_cure(), may_pass=False)
        if status == 404:
            return EndpointFault(
                f"knows no such model or path ({reason})",
                f"change {self._setting}.model, or {self._setting}.url (most end in /v1)",
                may_pass=False,
            )
        if status == 429:
            cure = (
                f"lower {self._setting}.max_concurrent, raise {self._setting}.retries, "
                "or look at the account's limits"
            )
            return EndpointFault(f"takes no more requests ({reason})", cure, may_pass=True, pause=pause)
        if status in (408, 409) or status >= 500:
            return EndpointFault(
                f"fails ({reason})",
                f"look after its server, or change {self._setting}.url",
                may_pass=True,
                pause=pause,
            )
        return EndpointFault(
            f"refuses the request ({reason})",
            f"change {self._setting}.model, or {self._setting}.url",
            may_pass=False,
        )

    def _key_cure(self) -> str:
        name = self._config.api_key_env
        setting = f"{self._setting}.api_key_env"
        if not name:
            return f"name the environment variable that holds its key in {setting}, which is empty"
        state = "holds another key" if self._key else "is not set"
        return f"set the environment variable {name}, which {state}, or change {setting}"

    def _safe(self, text: str) -> str:
        line = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _reply(completion: Any) -> Reply | None:
    """Read a completion, None where it is none. The client builds it from any JSON: no field is certain."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        return None
    message = getattr(choices[0], "message", None)
    # A server that parts thoughts from answers may leave the answer in the thoughts where these do not end.
    fields = ("content", "reasoning_content", "reasoning")
    text = next(filter(None, (_text(getattr(message, field, None)) for field in fields)), "")
    usage = getattr(completion, "usage", None)
    return Reply(
        text=text,
        prompt_tokens=_tokens(getattr(usage, "prompt_tokens", None)),
        generated_tokens=_tokens(getattr(usage, "completion_tokens", None)),
    )


def _text(content: object) -> str:
    """A message's text. It may come as a list of parts, {"type": "text", "text": ...}."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") if isinstance(part, dict) else getattr(part, "text", None) for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _tokens(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _address(url: str, setting: str) -> str:
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        usable = False
    if not usable:
        raise TaskError(
            f"{setting}.url must be an address such as http://127.0.0.1:8000/v1; "
            "it has no http(s), no host, or no usable port"
        )
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def _key(variable: str, setting: str) -> str:
    """The key in an environment variable, "" when there is none."""
    key = os.environ.get(variable, "").strip() if variable else ""
    # Such a key would fail in the header later, and that error would show it.
    if any(not "!" <= char <= "~" for char in key):
        raise TaskError(
            f"the environment variable {variable} holds white space or letters that no key has: "
            f"set it anew, or change {setting}.api_key_env"
        )
    return key


def _retry_after(header: str) -> float | None:
    """The header in seconds; None for a date or anything else."""
    try:
        seconds = float(header)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _root_cause(error: BaseException) -> str:
    """The innermost reason: "Connection refused" rather than "Connection error."."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
