"""What a GPU needs, without one: a faked platform, the same code on a CPU, and arithmetic.

Each test stands for a fault that reading vLLM's and DeepSpeed's code found before any GPU was there.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actors.engine.start import engine_arguments
from actors.episodes.recovery import Diverged, EpisodeLog, RecordedWriter, Written
from actors.fast_weights.basis import make_basis
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError
from actors.types import FastWeights, WriteExample, WriteRequest, WriteResult
from cluster.common.errors import StartupError
from cluster.fleet.episode_journal import EpisodeJournal
from cluster.fleet.ray_runtime import demand, require_gpus
from cluster.train import build
from configs.load import ConfigError, load_config
from configs.schema import EngineConfig, LearnerConfig, ModelConfig, ObjectiveConfig, RunConfig
from configs.shipped import shipped
from configs.tolerances import RECEIPT, REPLAY, receipt_tolerance
from learner import engine as learner_engine
from learner import head
from learner.engine import GuardedAdamW
from learner.learner import Learner
from learner.worker import LearnerActor
from tests.unit.learner_cases import group

BFLOAT16 = ModelConfig(dtype="bfloat16")
WITH_GPUS = [file for file in shipped().values() if "gpus_per_worker" in file.read_text(encoding="utf-8")]


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["rollout.gpus_per_worker=1"],
            "model.dtype='float32' is not allowed: it must be bfloat16 with rollout.gpus_per_worker above 0; "
            "vLLM's adapters on a GPU take 16-bit numbers only",
        ),
        (
            ["rollout.gpus_per_worker=2", "model.dtype=bfloat16"],
            "rollout.gpus_per_worker=2.0 is not allowed: it must be at most 1; an engine runs on one GPU "
            "(no tensor parallelism): raise rollout.workers",
        ),
        (
            ["learner.gpus_per_worker=2"],
            "learner.gpus_per_worker=2.0 is not allowed: it must be at most 1; a rank of the learner runs on "
            "one GPU (no tensor parallelism): raise learner.workers",
        ),
        (
            ["learner.gpus_per_worker=0.5", "learner.workers=2"],
            "learner.gpus_per_worker=0.5 is not allowed: it must be 0 or 1 with several learner.workers; "
            "NCCL takes one rank a GPU",
        ),
        (
            [
                "learner.weight_transfer=collective",
                "learner.gpus_per_worker=1",
                "rollout.gpus_per_worker=0.5",
                "model.dtype=bfloat16",
            ],
            "learner.weight_transfer='collective' is not allowed: it must be object_store where processes "
            "share a GPU; NCCL takes one process a GPU",
        ),
        (
            ["engine.tensor_parallel=2"],
            "'engine.tensor_parallel' is no setting; an engine runs on one GPU (no tensor parallelism): "
            "raise rollout.workers",
        ),
        (
            ["engine.tensor-parallel-size=2"],
            "'engine.tensor-parallel-size' is no setting; an engine runs on one GPU (no tensor parallelism): "
            "raise rollout.workers",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_in_one_line(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", WITH_GPUS, ids=lambda file: file.stem)
def test_configurations_for_gpus_leave_the_tolerance_to_the_dtype_and_have_time_to_compile(
    file: Path,
) -> None:
    config = load_config(file, ["environment.conversation.path=locomo.json"])
    assert config.model.dtype == config.learner.dtype == "bfloat16"
    assert config.engine.receipt_tolerance is None
    assert config.ray.startup_timeout_s >= 900


# --- tolerances follow from the dtype ---------------------------------------------------------------------


def test_the_tolerance_of_a_receipt_follows_from_the_dtype_unless_it_is_given() -> None:
    assert receipt_tolerance(EngineConfig(), ModelConfig()) == RECEIPT["float32"] == 0.02
    largest_seen = 0.472  # where engine and writer were right, see configs/tolerances.py
    assert receipt_tolerance(EngineConfig(), BFLOAT16) == RECEIPT["bfloat16"] > largest_seen
    assert receipt_tolerance(EngineConfig(receipt_tolerance=0.5), BFLOAT16) == 0.5


class _Again:
    """Writes again with a loss that is off by ``error``."""

    def __init__(self, error: float) -> None:
        self._error = error

    async def write(self, request: WriteRequest) -> WriteResult:
        weights = replace(request.weights, revision=1, b={"m": np.zeros((2, 1), np.float32)})
        return WriteResult(weights, None, 2.0, 1.0 + self._error, 5, 0.0, "accepted", "")


@pytest.mark.parametrize(
    ("dtype", "off", "follows"),
    [("float32", 0.005, True), ("float32", 0.05, False), ("bfloat16", 0.05, True), ("bfloat16", 1.0, False)],
)
def test_a_recovered_write_may_differ_by_the_rounding_of_the_dtype(
    dtype: str, off: float, follows: bool
) -> None:
    request = WriteRequest("e", FastWeights("b", 0, {}), (WriteExample((1,), (2,)),))
    tolerance = REPLAY[dtype]
    (event,) = _noted(request)
    replayed = RecordedWriter(_Again(off), EpisodeLog(lambda start, events: None, [event]), tolerance)
    if follows:
        assert asyncio.run(replayed.write(request)).outcome == "accepted"
    else:
        with pytest.raises(Diverged, match=f"tolerance {tolerance:g}"):
            asyncio.run(replayed.write(request))


def _noted(request: WriteRequest) -> list[Written]:
    kept: list[Any] = []
    log = EpisodeLog(lambda start, events: kept.extend(events), [])
    asyncio.run(RecordedWriter(_Again(0.0), log, 1.0).write(request))
    return kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_journal_gives_recoveries_the_tolerance_of_the_models_dtype(dtype: str) -> None:
    recovery = asyncio.run(EpisodeJournal(None, dtype).open("g"))
    assert recovery.tolerance == REPLAY[dtype]


# --- the engine's settings ----------------------------------------------------------------------------------


def faked_vllm(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    """Put a platform in the place of vLLM's; the real EngineArgs gets the same names in every engine test."""
    platform = SimpleNamespace(is_cpu=lambda: on_cpu)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    faked_vllm(monkeypatch, on_cpu=False)


@pytest.fixture(scope="module")
def tiny_basis() -> Basis:
    a = {"model.layers.1.mlp.up_proj": torch.eye(6, 16)}
    return make_basis("random", a, {"model.layers.1.mlp.up_proj": 32}, False)


def test_an_engine_on_a_gpu_has_its_own_step_and_no_float32(on_gpu: None, tiny_basis: Basis) -> None:
    made = engine_arguments("model", BFLOAT16, EngineConfig(slots=64, max_model_tokens=2048), tiny_basis, 0)
    assert made.max_num_batched_tokens == 8192 and made.enable_chunked_prefill and not made.enforce_eager
    assert made.kv_cache_memory_bytes is None and made.gpu_memory_utilization == 0.6
    with pytest.raises(EngineError, match=r"model\.dtype=float32 is not possible on a GPU.*set model\.dtype"):
        engine_arguments("model", ModelConfig(), EngineConfig(), tiny_basis, 0)


def test_a_kv_cache_of_a_given_size_is_taken_on_a_gpu_too_and_nothing_is_measured(
    on_gpu: None, tiny_basis: Basis
) -> None:
    made = engine_arguments("model", BFLOAT16, EngineConfig(kv_cache_gib=2.5), tiny_basis, 0)
    assert made.kv_cache_memory_bytes == int(2.5 * 2**30)
    # vLLM asks before it starts that its share is free, which a learner on the same GPU may have taken
    assert made.gpu_memory_utilization < 0.05


def test_on_a_cpu_the_kv_cache_has_a_gibibyte_unless_it_is_given(
    monkeypatch: pytest.MonkeyPatch, tiny_basis: Basis
) -> None:
    faked_vllm(monkeypatch, on_cpu=True)
    sizes = [
        engine_arguments("model", ModelConfig(), EngineConfig(kv_cache_gib=gib), tiny_basis, 0)
        for gib in (None, 0.5)
    ]
    assert [made.kv_cache_memory_bytes for made in sizes] == [2**30, 2**29]


# --- the start of a training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "order"), [(0.5, ["learner", "worker-0", "worker-1"]), (0, ["worker-0", "worker-1", "learner"])]
)
def test_on_shared_gpus_the_learner_is_up_before_an_engine_starts(
    share: float, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def start_learner(*_: object) -> Any:
        time.sleep(0.2)
        seen.append("learner")
        return SimpleNamespace(close=lambda: None)

    def worker(spec: Any, *_: object) -> Any:
        seen.append(spec.name)
        return SimpleNamespace(name=spec.name, kill=lambda: None)

    async def ready(*_: object, **__: object) -> None:
        pass

    settings = ["rollout.workers=2", "model.dtype=bfloat16"]
    settings += [f"rollout.gpus_per_worker={share}", f"learner.gpus_per_worker={share}"]
    config = load_config(None, settings)
    monkeypatch.setattr(build, "ray_runtime", lambda *_: nullcontext())
    monkeypatch.setattr(build, "cancel_on_sigterm", lambda: None)
    monkeypatch.setattr(build, "worker_process", lambda _: None)
    monkeypatch.setattr(build, "_ready", ready)
    monkeypatch.setattr(build, "RemoteWorker", worker)
    monkeypatch.setattr(build, "_start_learner", start_learner)
    start: Any = SimpleNamespace(state=SimpleNamespace(version=0), policy_path=Path("p"), checkpoint=None)
    spec, folder = SimpleNamespace(config=config), SimpleNamespace(basis=Path("b"), path=Path("f"))

    async def story() -> None:
        async with build.training_cluster(spec, folder, start):  # type: ignore[arg-type]
            pass

    asyncio.run(story())
    assert seen == order


def test_a_gpu_is_shared_where_both_ask_for_a_part_of_one() -> None:
    def shares(rollout: float, learner: float) -> bool:
        words = [f"rollout.gpus_per_worker={rollout}", f"learner.gpus_per_worker={learner}"]
        return load_config(None, ["model.dtype=bfloat16", *words]).shares_gpus

    assert shares(0.5, 0.5) and shares(0.3, 0.7)
    assert not (shares(1, 1) or shares(0.5, 0) or shares(0, 0.5) or RunConfig().shares_gpus)


def test_shares_that_no_two_gpus_can_hold_are_refused_on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["model.dtype=bfloat16", "rollout.workers=2", "learner.gpus_per_worker=0.6"]
    config = load_config(None, [*words, "rollout.gpus_per_worker=0.6"])  # 1.8 in all
    with pytest.raises(StartupError, match=r"asks for .* 3 GPU, this machine has 2 GPU.*no share is split"):
        require_gpus(config, demand(config, learner=True))
    require_gpus(config, demand(config, learner=False))
    fits = load_config(None, [*words, "rollout.gpus_per_worker=0.4"])
    require_gpus(fits, demand(fits, learner=True))


# --- the learner ------------------------------------------------------------------------------------------


def test_the_optimizer_is_fused_on_a_gpu_and_does_the_same(
    llama: Path, llama_basis: Basis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch has the fused step on a CPU too. Unfused, a step holds one more copy of all masters."""

    def made() -> Learner:
        config = LearnerConfig(learning_rate=1e-2, zero_stage=1)
        return Learner(config, ObjectiveConfig(importance="none"), str(llama), llama_basis, 0, 1.0, 0, 1)

    def stepped(learner: Learner) -> dict[str, torch.Tensor]:
        for seed in (1, 5):
            learner.step([group(llama_basis, (1.0, 0.0), seed)])
        return learner.weights(trainable_only=False)

    learner = made()
    start, plain = learner.weights(trainable_only=False), stepped(learner)
    init = GuardedAdamW.__init__
    monkeypatch.setattr(
        GuardedAdamW,
        "__init__",
        lambda self, params, config: init(self, params, replace(config, gpus_per_worker=1.0)),
    )
    learner = made()
    optimizer = learner._engine.optimizer
    assert optimizer.is_fused and all(part["fused"] for part in optimizer.param_groups)
    fused = stepped(learner)
    for name, value in plain.items():
        assert (fused[name] - value).norm() < 1e-3 * (value - start[name]).norm(), name
    learner.save(tmp_path / "c")
    learner.load(tmp_path / "c")
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_fused_optimizer_counts_on_the_device_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step counter on the CPU beside parameters on a GPU is an error in torch's fused step."""
    engine = object.__new__(learner_engine.TrainingEngine)
    engine.zero_stage = 0
    for gpus, device in ((1.0, "meta"), (0.0, "cpu")):
        config = LearnerConfig(zero_stage=0, gpus_per_worker=gpus)
        engine.optimizer = GuardedAdamW(iter([nn.Parameter(torch.zeros(3))]), config)
        parameter = torch.zeros(3, device="meta")  # stands for a GPU
        monkeypatch.setattr(engine, "_flat_parameters", lambda parameter=parameter: [parameter])
        engine._materialize()
        assert engine.optimizer.state[parameter]["step"].device.type == device


def test_the_heads_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 over many chunks: 0.3 % off. A sum in bfloat16 was 1 % off, as small terms are lost."""
    tokens, width, vocabulary = 512, 32, 64
    monkeypatch.setattr(head, "_CHUNK", 4 * vocabulary)  # 128 chunks
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(width, vocabulary, bias=False)
    layer.weight.data = torch.randn(vocabulary, width, generator=draw).to(torch.bfloat16)
    states = (torch.randn(tokens, width, generator=draw) + 1).to(torch.bfloat16)
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    head.TokenHead(layer)(states, targets, 1.0)[0].sum().backward()
    exact = layer.weight.detach().double().requires_grad_(True)
    logs = (states.double() @ exact.T).log_softmax(-1)
    (right,) = torch.autograd.grad(logs.gather(-1, targets[:, None]).sum(), exact)
    found = layer.weight.grad
    assert found is not None and found.dtype == torch.bfloat16
    assert float((found.double() - right).norm() / right.norm()) < 0.005


def test_the_head_takes_larger_chunks_on_a_gpu() -> None:
    def sizes(device: str) -> list[int]:
        states, weight = torch.empty(8192, 8, device=device), torch.empty(151_936, 8, device=device)
        return [part.stop - part.start for part in head._chunks(states, weight)]

    assert sizes("cpu")[0] == 55 and sizes("meta")[0] == 441  # meta stands for any other device
    assert sum(sizes("meta")) == 8192


def test_only_the_first_rank_copies_weights_to_the_cpu(llama: Path, llama_basis: Basis) -> None:
    learner = Learner(LearnerConfig(), ObjectiveConfig(), str(llama), llama_basis, 0, 1.0, 0, 1)
    assert learner.weights(trainable_only=False, wanted=False) == {}
    asked: list[bool] = []

    def weights(trainable_only: bool, copy: bool, wanted: bool) -> dict[str, Any]:
        asked.append(wanted)
        return {}

    for rank in (0, 1):
        actor = LearnerActor.__ray_metadata__.modified_class(None, rank)  # type: ignore[attr-defined]
        actor._learner = SimpleNamespace(weights=weights, version=0)
        actor.weights(True)
    assert asked == [True, False]
