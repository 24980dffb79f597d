"""The controller over virtual workers on a real Ray: groups stay in the object store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.episodes.group_summary import GroupSummary
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.types import TrajectoryGroup
from actors.worker import WorkerSpec
from cluster.bench.controller import SIBLINGS, run
from cluster.bench.controller_actors import VirtualWorkers, virtual_handle
from cluster.bench.scripted import QUICKSTART, recall_groups
from cluster.bench.values import Context, Goal
from cluster.common.errors import WorkerLost
from cluster.fleet.ray_runtime import Demand, ray_runtime
from cluster.fleet.remote_worker import RemoteWorker
from configs.load import load_config
from configs.schema import FastWeightsConfig, RayConfig, RunConfig
from tests.unit.cluster_cases import task_at

pytestmark = pytest.mark.slow

CONFIG = RunConfig(ray=RayConfig(object_store_gib=0.2))


@pytest.fixture
def template(model_path: Path) -> TrajectoryGroup:
    config = load_config(QUICKSTART, [])
    basis = compute_basis_from_checkpoint(model_path, FastWeightsConfig(basis="random"), seed=0)
    return recall_groups(model_path, config, basis, 1, SIBLINGS)[0]


def test_only_the_summary_comes_to_the_controller_and_the_group_outlives_its_worker(
    template: TrajectoryGroup,
) -> None:
    async def body() -> None:
        actor: Any = VirtualWorkers
        process = actor.options(max_concurrency=4).remote(template, 0.01)
        worker = RemoteWorker(
            WorkerSpec("worker-0", CONFIG, "", "", 3), virtual_handle(process, 0, 0.01), journal=None
        )
        assert await worker.started == "worker-0"
        finished = await worker.group(5, task_at(5))
        assert isinstance(finished.content, ray.ObjectRef)
        ray.kill(process)
        content: TrajectoryGroup = await finished.content
        assert finished.summary == GroupSummary.of(content)
        summary = finished.summary
        assert (summary.task_id, summary.policy_version, len(summary.episodes)) == ("t5", 3, SIBLINGS)
        first, second = (trajectory.revisions[-1].b for trajectory in content.trajectories[:2])
        # SmolLM2-135M: layers x rows x rank x float32.
        assert sum(matrix.nbytes for matrix in first.values()) == 4 * (2 * 1536 + 576) * 6 * 4
        # Siblings share no array: a shared array would travel once.
        assert not any(np.array_equal(first[name], second[name]) for name in first)
        with pytest.raises(WorkerLost, match="worker-0 died during task t6"):
            await worker.group(6, task_at(6))

    with ray_runtime(CONFIG, Demand(cpus=1, gpus=0)):
        asyncio.run(body())


def test_the_benchmark_has_its_cases_its_table_and_its_plot(tiny_model_path: Path, tmp_path: Path) -> None:
    outcome = run(Context(tiny_model_path, repeats=2, threads=1, quick=True, folder=tmp_path))
    throughput, cpu = outcome.cases
    assert (throughput.goal, cpu.goal) == (Goal("at least", 0.95), Goal("at most", 0.25))
    assert throughput.baseline_values == (24.0, 24.0)  # 12 workers, half a second a group
    assert all(value > 0 for case in outcome.cases for value in case.candidate_values)
    (table,) = outcome.tables
    assert [row[0] for row in table.rows] == ["1", "12"]
    assert all(len(row) == len(table.header) for row in table.rows)
    assert outcome.plots == (tmp_path / "controller.png",) and outcome.plots[0].stat().st_size > 5000
