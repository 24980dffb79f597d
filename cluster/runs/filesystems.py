"""Opens the way to a store: pyarrow.fs speaks to S3, to Google's store, and to a mounted disk.

A request that gets no byte ends:
    s3      after timeout_s, and is tried twice; the upload of a file is a few requests
    gs      after the two minutes of Google's client; what fails sooner is tried again for timeout_s
    file    when the kernel gives the disk up
"""

from __future__ import annotations

import datetime as dt
import math
import os
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def open_filesystem(url: str, timeout_s: float) -> FileSystem:
    """The way to what lies at ``url``. A region of S3 that nobody named is asked for: raises OSError."""
    from pyarrow import fs

    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "gs":
        return fs.GcsFileSystem(
            scheme=options.get("scheme"),
            endpoint_override=options.get("endpoint_override"),
            retry_time_limit=dt.timedelta(seconds=math.ceil(timeout_s)),  # it takes whole seconds
        )
    if parts.scheme != "s3":
        filesystem, _ = fs.FileSystem.from_uri(url)
        return filesystem
    endpoint = options.get("endpoint_override") or _of_environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    scheme, _, host = endpoint.rpartition("://")
    region = options.get("region") or _of_environment("AWS_REGION", "AWS_DEFAULT_REGION")
    if not region and not host:
        region = fs.resolve_s3_region(parts.netloc)
    return fs.S3FileSystem(
        region=region or None,
        endpoint_override=host.rstrip("/") or None,
        scheme=options.get("scheme") or scheme or "https",
        connect_timeout=timeout_s,
        request_timeout=timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        allow_delayed_open=True,  # a small file is one request
        background_writes=False,  # else parts of a large file pile up in memory before a slow store
    )


def _of_environment(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")
