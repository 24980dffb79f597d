"""Whether somebody listens at a web address: known in seconds, where a client would try for a minute."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_CONNECT_S = 3.0  # to a server that answers at all


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
