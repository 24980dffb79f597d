"""Asks a host one short question before a library works on it for minutes: the Hugging Face hub, or any.

    the hub answers      --> the libraries work as they always do
    it does not answer   --> they look into their local cache alone: no retries, no lines of theirs

Left alone, they ask for each file six times, with pauses: 23 s for a model, 70 s for an embedder. The retries
have no setting of their own. Checked on huggingface_hub 2.4.0, whose `is_offline_mode` reads
``constants.HF_HUB_OFFLINE`` at each call, for transformers and sentence-transformers too.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_CONNECT_S = 3.0  # to a server that answers at all

Kind = Literal["model", "dataset"]
WAIT_S = 5.0
_TIMED_OUT = "timed out"
_WAIT_NAME = "HF_HUB_ETAG_TIMEOUT"  # huggingface_hub's own name for how long it waits for a hub's first word


@contextmanager
def hub_or_cache(name: str, kind: Kind = "model") -> Iterator[str]:
    """Let the block use the hub, or the local cache alone where the hub does not answer.

    Yields why it cannot be asked, in words without a line break. Empty: it answered, or ``name`` is a folder.
    """
    if Path(name).expanduser().is_dir():
        yield ""
        return
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    silence = "HF_HUB_OFFLINE is set" if was_offline else _silence(name, kind)
    constants.HF_HUB_OFFLINE = was_offline or bool(silence)
    try:
        yield silence
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _silence(name: str, kind: Kind) -> str:
    """Why the hub does not answer. Empty when it does, if only to say that it does not know ``name``."""
    wait = _wait()
    no_answer = f"no answer in {wait:g} s; {_WAIT_NAME}=30 waits longer"
    found: list[str] = []
    # A thread: neither the look-up of a host's name nor the tries of all its addresses end at one timeout.
    ask = threading.Thread(target=lambda: found.append(_problem(name, kind, wait)), name="hub", daemon=True)
    ask.start()
    ask.join(wait)
    return no_answer if not found or found[0] == _TIMED_OUT else found[0]


def _problem(name: str, kind: Kind, wait: float) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=wait)
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"status {status}" if status >= 500 else ""
    except httpx2.TimeoutException:
        return _TIMED_OUT
    except httpx2.HTTPError as error:
        return " ".join(str(error).split()) or type(error).__name__
    except HFValidationError:
        return ""  # no name of a repository; the library that reads it says so
    except Exception as error:  # noqa: BLE001  whatever is at that address: a portal's page, half a mirror
        return f"its answer cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return ""


def _wait() -> float:
    try:
        return float(os.environ.get(_WAIT_NAME) or WAIT_S)
    except ValueError:
        return WAIT_S


def unreachable(url: str) -> str:
    """Why nobody can be reached at ``url`` (http or https); "" where somebody listens. Sends nothing.

    Also "" behind a proxy, which knows the way to hosts that this machine does not.
    """
    try:
        address = urlsplit(url)
        host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
        if address.scheme in getproxies() and not proxy_bypass(host):
            return ""
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""
