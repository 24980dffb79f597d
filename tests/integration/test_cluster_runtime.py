"""Waiting for actors on a real Ray: an actor that is late, dead, failing or without a place is named."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import ray
import torch

from cluster.common.errors import StartupError, WorkerLost
from cluster.fleet.broadcast import ObjectStoreChannel
from cluster.fleet.ray_runtime import (
    Demand,
    all_ready,
    answer,
    cancel_on_sigterm,
    cluster_resources,
    demand,
    ray_runtime,
)
from configs.schema import LearnerConfig, RayConfig, RolloutConfig, RunConfig

CONFIG = RunConfig(ray=RayConfig(object_store_gib=0.2))


@ray.remote(num_cpus=0, max_restarts=0)
class Actor:
    def value(self, number: int) -> int:
        return number

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def refuse(self) -> None:
        raise ValueError("names are missing\nand more")

    def die(self) -> None:
        os._exit(1)

    def weights(self) -> dict[str, torch.Tensor]:
        return {"w": torch.arange(4.0)}


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with ray_runtime(CONFIG, Demand(cpus=3, gpus=0)):
        yield


def wait(actor: Any, method: str, *arguments: object, deadline_s: float = 30) -> Any:
    return asyncio.run(answer(getattr(actor, method).remote(*arguments), deadline_s, "worker-3", "task t9"))


@pytest.fixture
def actor() -> Iterator[Any]:
    handle: Any = Actor.remote()  # type: ignore[attr-defined]
    yield handle
    ray.kill(handle)


_STRANGER = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=20))
"""


@pytest.mark.parametrize("token", [None, "f" * 64, "own"])
def test_a_local_ray_answers_nobody_without_its_token(token: str | None) -> None:
    """The GCS listens on every interface: whoever may ask it may run code here."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled" if token is None else "token"}
    own = environment.pop("RAY_AUTH_TOKEN")
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = own if token == "own" else token
    command = [sys.executable, "-c", _STRANGER, ray.get_runtime_context().gcs_address]
    stranger = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert (stranger.returncode == 0) == (token == "own"), stranger.stderr
    assert token == "own" or "nauthenticated" in stranger.stderr.lower()
    assert own not in " ".join(word for child in _children() for word in child.cmdline())


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_an_answer_in_time(actor: Any) -> None:
    assert wait(actor, "value", 4) == 4


def test_a_late_actor_is_named(actor: Any) -> None:
    wait(actor, "value", 0)
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="worker-3 did not finish task t9 within 1 s"):
        wait(actor, "sleep", 20, deadline_s=1)
    assert time.monotonic() - began < 10


def test_a_refusal_is_one_line_with_its_cause(actor: Any) -> None:
    with pytest.raises(WorkerLost) as caught:
        wait(actor, "refuse")
    assert str(caught.value) == "worker-3 failed in task t9: ValueError: names are missing and more"


def test_a_dead_actor_is_named(actor: Any) -> None:
    with pytest.raises(WorkerLost, match="worker-3 died during task t9"):
        wait(actor, "die")


def test_an_actor_that_cannot_be_placed_is_named_with_what_the_cluster_has(actor: Any) -> None:
    greedy = Actor.options(num_cpus=64).remote()  # type: ignore[attr-defined]
    needed = Demand(cpus=64, gpus=0)
    with pytest.raises(
        StartupError,
        match=r"worker-1 did not start within .*asks for 64 CPU and 0 GPU, Ray has \d+ CPU, 0 GPU on 1 node",
    ):
        asyncio.run(
            all_ready({"worker-0": actor.value.remote(1), "worker-1": greedy.value.remote(1)}, 5, needed)
        )
    ray.kill(greedy)


def test_an_actor_that_fails_to_start_ends_the_wait_at_once(actor: Any) -> None:
    began = time.monotonic()
    with pytest.raises(StartupError, match="worker-0 failed in starting: ValueError: names are missing"):
        asyncio.run(
            all_ready(
                {"worker-0": actor.refuse.remote(), "worker-1": actor.sleep.remote(20)}, 600, Demand(1, 0)
            )
        )
    assert time.monotonic() - began < 300  # not the deadline of 600 s


def test_published_weights_are_fetched_by_version(actor: Any) -> None:
    class Source:
        version = 7

        def weights_ref(self, trainable_only: bool) -> Any:
            return actor.weights.remote()

    weights = ObjectStoreChannel(trainable_only=True).publish(Source())
    assert (weights.version, weights.complete) == (7, False)
    assert weights.fetch(30)["w"].tolist() == [0, 1, 2, 3]


def test_a_published_version_stays_what_it_was_when_the_learner_steps_on() -> None:
    """The learner hands out its own memory: Ray must have stored it before the next step overwrites it."""

    @ray.remote
    class Holder:
        def __init__(self) -> None:
            self.w = torch.zeros(500_000)

        def weights(self) -> dict[str, torch.Tensor]:
            return {"w": self.w, "part": self.w.view(5, -1)[2]}

        def step(self) -> None:
            self.w += 1

    holder = Holder.remote()

    class Source:
        version = 3

        def weights_ref(self, trainable_only: bool) -> Any:
            return holder.weights.remote()

    first = ObjectStoreChannel(trainable_only=False).publish(Source())
    ray.get(holder.step.remote(), timeout=120)  # a busy machine starts actors late
    second = ObjectStoreChannel(trainable_only=False).publish(Source())
    ray.get(holder.step.remote(), timeout=120)  # a busy machine starts actors late
    for weights, expected in ((first, 0), (second, 1)):
        fetched = weights.fetch(30)
        assert all(bool((tensor == expected).all()) for tensor in fetched.values()) and fetched[
            "part"
        ].shape == (100_000,)
    ray.kill(holder)


def test_a_small_machine_is_told_of_the_cpus_that_the_run_asks_for() -> None:
    assert ray.cluster_resources()["CPU"] >= 3
    assert "on 1 node" in cluster_resources()


def test_a_jobs_stop_cancels_the_run_also_after_ray_has_put_its_own_handler() -> None:
    async def body() -> str:
        cancel_on_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            return "ended in good order"
        return "slept"

    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert asyncio.run(body()) == "ended in good order"
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


def test_demand_counts_workers_and_learner() -> None:
    config = replace(
        CONFIG,
        rollout=RolloutConfig(workers=3, cpus_per_worker=2),
        learner=LearnerConfig(workers=2, gpus_per_worker=1),
    )
    assert demand(config, learner=True) == Demand(cpus=8, gpus=2)
    assert demand(config, learner=False) == Demand(cpus=6, gpus=0)


def test_demand_counts_custom_resources() -> None:
    shared = replace(
        CONFIG,
        rollout=RolloutConfig(workers=3, resource="big"),
        learner=LearnerConfig(workers=2, resource="big"),
    )
    assert demand(shared, learner=True).custom == (("big", 5),)
    apart = replace(
        CONFIG,
        rollout=RolloutConfig(workers=3, resource="rollout"),
        learner=LearnerConfig(workers=2, resource="learner"),
    )
    assert str(demand(apart, learner=True)) == "5 CPU, 0 GPU, 2 learner and 3 rollout"
