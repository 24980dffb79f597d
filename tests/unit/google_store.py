"""A server of Google's store on loopback, and the service account that its clients sign in with."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

BUCKET = "bucket"
_SERVER = """
import sys
from gcp_storage_emulator.server import create_server

store = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2])
store.start()
print("up", flush=True)
sys.stdin.read()
store.stop()
"""


@dataclass
class GoogleServer:
    """``url``: of a folder in its bucket. ``key``: the file that GOOGLE_APPLICATION_CREDENTIALS names."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.key.write_text(json.dumps(_account()))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(self.port), BUCKET],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline().strip() == "up"

    @property
    def key(self) -> Path:
        return self.folder / "account.json"

    @property
    def url(self) -> str:
        return f"gs://{BUCKET}/runs?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _account() -> dict[str, str]:
    """A service account as Google hands it out, with a key of its own. Its tokens are signed by the key."""
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return {
        "type": "service_account",
        "project_id": "engram",
        "private_key_id": "of-the-test",
        "private_key": rsa.generate_private_key(65537, 2048).private_bytes(*form).decode(),
        "client_email": "runs@engram.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }
