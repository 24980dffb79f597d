"""Ray's own processes die. A listener stands for the GCS and a sleeping process for the raylet."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from cluster.fleet import ray_watch
from cluster.fleet.ray_watch import RayDied, watched


@dataclass
class Stand:
    gcs: socket.socket
    raylet: subprocess.Popen[bytes]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    with socket.create_server(("127.0.0.1", 0)) as gcs, subprocess.Popen(["sleep", "600"]) as raylet:
        address = gcs.getsockname()
        monkeypatch.setattr(ray_watch, "_POLL_S", 0.05)
        monkeypatch.setattr(ray_watch, "_gcs_address", lambda: address)
        monkeypatch.setattr(ray_watch, "_raylet", lambda: psutil.Process(raylet.pid))
        yield Stand(gcs, raylet)
        raylet.kill()


async def waits(ray: Stand, strike: str) -> None:
    with watched(local=True):
        await asyncio.sleep(0.3)
        if strike == "raylet":
            ray.raylet.kill()
        elif strike == "gcs":
            ray.gcs.close()
        await asyncio.sleep(0.5 if strike == "none" else 60)


@pytest.mark.parametrize(
    ("strike", "who"), [("raylet", "raylet on this machine"), ("gcs", "GCS at 127.0.0.1:")]
)
def test_the_death_of_a_process_of_rays_ends_the_block_with_one_line(
    ray: Stand, strike: str, who: str
) -> None:
    began = time.monotonic()
    with pytest.raises(RayDied, match=rf"^Ray's {who}.* died \(killed, or out of memory\)"):
        asyncio.run(waits(ray, strike))
    assert time.monotonic() - began < 20


def test_while_ray_lives_nothing_happens(ray: Stand) -> None:
    asyncio.run(waits(ray, "none"))


def test_an_error_of_the_block_stays_what_it_is_while_ray_lives(ray: Stand) -> None:
    with pytest.raises(ValueError, match="of the block"), watched(local=True):
        raise ValueError("of the block")


def test_a_call_that_never_returns_is_no_way_out() -> None:
    """The process ends with the line all the same."""
    code = """
import asyncio, os, time
from cluster.common.quiet import quiet
from cluster.fleet import ray_watch
ray_watch._POLL_S, ray_watch.GRACE_S = 0.05, 0.3
ray_watch._gcs_address = lambda: ("127.0.0.1", 9)
ray_watch._raylet = lambda: None
async def main():
    with quiet(verbose=False), ray_watch.watched(local=True):
        time.sleep(60)
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: Ray's GCS at 127.0.0.1:9 died") and "resume=auto" in done.stderr
