"""Groups that wait for the learner on a node that dies, on a real Ray of two nodes.

The stream issues their tasks again (unit/test_stream.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from configs.schema import LearnerConfig, ObjectiveConfig
from learner.types import LearnerError
from learner.worker import LearnerGroup, LearnerSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STORE = 100 * 2**20
LARGE = 200_000  # bytes; a result below 100 KB travels with the answer and is never lost


@ray.remote(num_cpus=1, max_restarts=0)
class Rank:
    """What LearnerGroup asks of a rank here."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None: ...

    def address(self) -> tuple[str, int]:
        return "", 0

    def start(self, host: str, port: int) -> int:
        return 0

    def hold(self, *groups: object) -> None: ...


@ray.remote(num_cpus=2, max_restarts=0)
class Worker:
    def group(self, size: int) -> np.ndarray:
        return np.zeros(size, dtype=np.uint8)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One CPU on the first node, where the learner goes."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE},
    )
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_groups_that_die_with_their_node_are_named_and_a_dead_rank_is_an_error(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    ray.init(address=cluster.address, log_to_driver=False)
    spec = LearnerSpec(LearnerConfig(step_timeout_s=120), ObjectiveConfig(), "", cast("Any", None), 0, 1.0)
    learner = LearnerGroup(spec, 240, actor=Rank)
    worker = Worker.remote()  # type: ignore[attr-defined]
    groups = [worker.group.remote(size) for size in (10, LARGE, 10, LARGE)]
    ray.wait(groups, num_returns=len(groups), timeout=120, fetch_local=False)
    fetched = worker.group.remote(LARGE)
    assert learner.missing([groups[0], fetched]) == []
    cluster.remove_node(node, allow_graceful=False)
    assert learner.missing(groups) == [1, 3]
    assert learner.missing([groups[0], groups[2]]) == []
    assert learner.missing([fetched]) == []  # it was brought to the learner's node before
    (rank,) = learner._actors
    ray.kill(rank)
    with pytest.raises(LearnerError, match="learner hold: a rank's process died"):
        for _ in range(300):  # Ray kills in the background
            learner.missing(groups[:1])
            time.sleep(0.1)
