"""Addresses of stores: what ``output_dir`` may be beside a folder.

    s3://bucket/runs?region=eu-west-1        the key comes from the environment, as AWS's own tools read it
    gs://bucket/runs                         GOOGLE_APPLICATION_CREDENTIALS, or the machine's own account
    file:// and the path of a mounted disk

None of them holds a credential: settings are saved and logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

from configs.bounds import HIDDEN, BoundError

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "s3": ("region", "scheme", "endpoint_override"),
    "gs": ("scheme", "endpoint_override"),
    "file": (),
}
BOUND = (
    "a folder, or s3://bucket/path, gs://bucket/path, or file:// and a path; behind ? s3 takes region, "
    "scheme and endpoint_override, gs the last two; credentials come from the environment, never from an "
    "address"
)


def is_url(text: str) -> bool:
    """Whether ``text`` is an address, and no folder."""
    return "://" in text


def store_url(config: object, *names: str) -> None:
    """Require that the named fields are folders, or addresses of stores. A refused address is not shown."""
    for name in names:
        text = str(getattr(config, name))
        if is_url(text) and not is_allowed(text):
            raise BoundError(name, HIDDEN, BOUND)


def is_allowed(text: str) -> bool:
    """Whether an address is one of a store, and has no credential in it."""
    try:
        parts = urlsplit(text)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        return False
    known = OPTIONS.get(parts.scheme)
    if known is None or "@" in unquote(text) or parts.fragment or not text.isprintable():
        return False
    folders = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    place = not parts.netloc and folders if parts.scheme == "file" else parts.netloc
    plain = ":" not in parts.netloc and not {"", ".", ".."} & set(folders)
    return bool(place) and plain and all(key in known for key, _ in options)
