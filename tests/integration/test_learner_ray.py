"""The learner behind Ray: one rank on a local Ray, its failures and deadlines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from actors.fast_weights.delta import Basis
from actors.weight_transfer import Rendezvous
from cluster.fleet.broadcast import ObjectStoreChannel, ObjectStoreWeights
from cluster.fleet.collective import CollectiveChannel
from configs.schema import LearnerConfig
from learner.types import LearnerError, LearnerLost
from learner.worker import LearnerGroup, LearnerSpec
from tests.integration.scripted_engine import Engine
from tests.unit.learner_cases import UNWEIGHTED, free, group, learner, segments_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        namespace="learner-tests",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def spec(folder: Path, basis: Basis, config: LearnerConfig) -> LearnerSpec:
    return LearnerSpec(config, UNWEIGHTED, str(folder), basis, seed=0, temperature=1.0)


def test_the_group_trains_like_a_learner_in_this_process(
    cluster: None, llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    config = free(zero_stage=1)
    remote = LearnerGroup(spec(llama, llama_basis, config), start_timeout_s=300)
    local = learner(llama, llama_basis, config)
    groups = [group(llama_basis, (1.0, 0.0, 0.25))]
    segments = [part for _, part in segments_of(groups)]
    try:
        assert remote.version == 0
        assert remote.warm_start_step(segments, 1e-3).loss == pytest.approx(
            local.warm_start_step(segments, 1e-3).loss, rel=1e-5
        )
        stored = [ray.put(one) for one in groups]
        assert remote.step(stored).loss == pytest.approx(local.step(groups).loss, rel=1e-5)
        assert remote.version == 2
        weights = ray.get(remote.weights_ref(trainable_only=False), timeout=60)
        expected = local.weights(trainable_only=False)
        assert weights.keys() == expected.keys()
        assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in weights)
        remote.save(str(tmp_path / "c"))
        first = remote.step(stored)
        assert remote.load(str(tmp_path / "c")) == 2 == remote.version
        assert replace(remote.step(stored), seconds=0) == replace(first, seconds=0)
        nothing = r"^nothing to learn from: 0 groups hold 0 finished episodes and no sampled token$"
        with pytest.raises(LearnerError, match=nothing):
            remote.step([])
        with pytest.raises(
            ValueError, match=r"^task .*reward 0 is nan: a reward must be a finite"
        ) as refused:
            remote.step([ray.put(group(llama_basis, (math.nan, 1.0)))])
        assert type(refused.value) is ValueError  # the rank's own, not Ray's wrapping of it
        with pytest.raises(LearnerError, match=r"^learner step: a rank failed: AttributeError: .*'str'"):
            remote.step([ray.put("no group")])  # what no rank foresees is named too
    finally:
        remote.close()


def test_a_rank_that_cannot_be_placed_is_named(cluster: None, llama: Path, llama_basis: Basis) -> None:
    asked = r"\(asked for 64 CPUs and 0 GPUs for each of 1 learner ranks"
    with pytest.raises(LearnerError, match=rf"no answer from rank \[0\] within 3 s {asked}"):
        LearnerGroup(spec(llama, llama_basis, free(cpus_per_worker=64)), start_timeout_s=3)


def test_a_rank_that_died_is_said_to_have_died_and_starts_again_from_a_checkpoint(
    cluster: None, llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    remote = LearnerGroup(spec(llama, llama_basis, free()), start_timeout_s=300)
    groups = [ray.put(group(llama_basis, (1.0, 0.0)))]
    remote.step(groups)
    remote.save(str(tmp_path / "c"))
    expected = remote.step(groups)
    ray.kill(remote._actors[0])
    with pytest.raises(LearnerLost, match="a rank's process died"):
        remote.step(groups)
    with pytest.raises(LearnerLost, match="learner weights: a rank's process died"):
        remote.weights_ref(trainable_only=False)
    remote.restart(str(tmp_path / "c"), lost_versions=2)
    assert remote.version == 1 + 2
    again = remote.step(groups)
    assert again.version == 2 + 2
    assert replace(again, version=2, seconds=0) == replace(expected, seconds=0)
    remote.close()
    with pytest.raises(LearnerError, match="the learner was closed"):
        remote.restart(None, 0)


@dataclass(frozen=True)
class Worker:
    """The driver's view of an Engine (cluster.fleet.collective.Member)."""

    name: str
    actor: Any

    def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> Future[None]:
        answered: Future[None] = self.actor.receive.remote(meeting, rank, transfer, deadline_s).future()
        return answered

    def refresh(self, weights: ObjectStoreWeights) -> tuple[str, dict[str, Tensor]]:
        loaded: tuple[str, dict[str, Tensor]] = ray.get(self.actor.refresh.remote(weights), timeout=120)
        return loaded


def test_two_ranks_broadcast_to_two_engines_of_which_one_dies_and_one_comes_late(
    cluster: None, llama: Path, llama_basis: Basis
) -> None:
    """Under ZeRO-3 both ranks gather what rank 0 sends."""

    def engine(number: int, dies: bool = False) -> Worker:
        return Worker(f"worker-{number}", Engine.remote(dies))  # type: ignore[attr-defined]

    ranks = free(zero_stage=3, workers=2, cpus_per_worker=0)
    learner = LearnerGroup(spec(llama, llama_basis, ranks), start_timeout_s=300)
    workers, said = [engine(0), engine(1)], list[str]()
    channel = CollectiveChannel(
        ObjectStoreChannel(trainable_only=False), learner, lambda: workers, "gloo", said.append
    )
    groups = [ray.put(group(llama_basis, (1.0, 0.0)))]

    def publish() -> tuple[ObjectStoreWeights, dict[str, Tensor]]:
        learner.step(groups)
        weights = channel.publish(learner)
        return weights, ray.get(weights.ref, timeout=120)

    def check(worker: Worker, weights: ObjectStoreWeights, stored: dict[str, Tensor], way: str) -> None:
        came, loaded = worker.refresh(weights)
        assert came == way and loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)

    # the start of a process is no part of a broadcast's deadline
    ray.get([worker.actor.__ray_ready__.remote() for worker in workers], timeout=300)
    try:
        weights, stored = publish()
        late = engine(2, dies=True)
        check(late, weights, stored, "store")
        for worker in workers:
            check(worker, weights, stored, "broadcast")
        assert said == []
        workers.append(late)  # it belongs to the next group, and dies in its first broadcast
        weights, stored = publish()
        assert "worker-2: " in said[0] and "from the object store" in said[0]
        for worker in workers[:2]:
            _, loaded = worker.refresh(weights)  # whole, whichever way it came
            assert all(torch.equal(loaded[name], stored[name]) for name in stored)
        del workers[2]
        weights, stored = publish()
        for worker in workers:
            check(worker, weights, stored, "broadcast")
        assert len(said) == 1 and learner.version == weights.version == 3
    finally:
        learner.close()
        for worker in [*workers, late]:
            ray.kill(worker.actor)
