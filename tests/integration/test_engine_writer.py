"""The writer on a real vLLM engine's own weights equals the writer on a checkpoint, also after a refresh.

It holds no second model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.engine.policy import VLLMPolicy
from actors.environments.recall import RecallEnvironment
from actors.episodes.recovery import Event, Progress, Recovered, Recovery, Sampled, Written
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.memory.build import surroundings
from actors.protocols import WriterError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Sampling, Trajectory, WriteExample, WriteRequest, WriteResult
from actors.write.writer import BatchedWriter, checkpoint_writer
from cluster.fleet.episode_journal import GroupJournal
from configs.schema import (
    EmbedderConfig,
    EngineConfig,
    FastWeightsConfig,
    MemoryConfig,
    ModelConfig,
    RecallConfig,
    RolloutConfig,
    WriteConfig,
)

pytestmark = pytest.mark.engine_in_process
WRITE = WriteConfig(optimizer="sgd", learning_rate=5e-3, epochs=3, batch_size=4)


@pytest.fixture(scope="module")
def basis(tiny_model_path: Path) -> Basis:
    return compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(last_layers=2), seed=0)


@pytest.fixture(scope="module")
def policy(tiny_model_path: Path, basis: Basis) -> Iterator[VLLMPolicy]:
    engine = EngineConfig(slots=4, max_model_tokens=256, kv_cache_gib=0.25)
    policy = VLLMPolicy(tiny_model_path, ModelConfig(), engine, basis, (2,), version=0, threads=1, seed=0)
    yield policy
    policy.close()


def requests(basis: Basis) -> list[WriteRequest]:
    draw = np.random.default_rng(7)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.integers(100, 40000, draw.integers(low, high + 1)).tolist())

    prefix = tokens(12, 12)

    def examples() -> tuple[WriteExample, ...]:
        return tuple(WriteExample(prefix + tokens(3, 9), tokens(2, 7)) for _ in range(6))

    return [WriteRequest(name, zero(basis), examples()) for name in ("a", "b")]


def largest_difference(left: list[WriteResult], right: list[WriteResult]) -> float:
    return max(
        float(np.abs(b - other.weights.b[name]).max())
        for result, other in zip(left, right, strict=True)
        for name, b in result.weights.b.items()
    )


def moved(results: list[WriteResult]) -> float:
    return max(float(np.abs(matrix).max()) for result in results for matrix in result.weights.b.values())


def checked(reference: BatchedWriter, results: list[WriteResult], asked: list[WriteRequest]) -> None:
    expected = reference.write(asked)
    assert [result.outcome for result in results] == ["accepted", "accepted"], [
        result.reason for result in results
    ]
    assert largest_difference(results, expected) <= 1e-6 < 1e-3 < moved(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.probe is not None and theirs.probe is not None
        assert ours.loss_after == pytest.approx(theirs.loss_after, abs=1e-4)
        assert ours.probe.after == pytest.approx(theirs.probe.after, abs=1e-4)


async def _install_and_act(policy: VLLMPolicy, result: WriteResult, episode: str) -> None:
    """The receipt compares the engine's own log-probs with the probe of the write."""
    key = AdapterKey(policy.version, episode, 1)
    before = policy.stats().receipts_passed
    await policy.install(key, result.weights, result.probe)
    assert policy.stats().receipts_passed == before + 1
    assert (await policy.generate((5, 6, 7), Sampling(0.0, 4, 0, "act"), key)).token_ids
    await policy.release([key])


def test_writes_on_the_engines_weights_equal_those_on_a_checkpoint_also_after_a_refresh(
    policy: VLLMPolicy, basis: Basis, tiny_model_path: Path, tmp_path: Path
) -> None:
    asked = requests(basis)
    writer = policy.writer(WRITE)  # the same over a refresh: it may remember nothing of the old theta
    results = writer.write(asked)
    on_checkpoint = checkpoint_writer(str(tiny_model_path), basis, WRITE, "float32", torch.device("cpu"))
    checked(on_checkpoint, results, asked)
    asyncio.run(_install_and_act(policy, results[0], "before"))

    draw = torch.Generator().manual_seed(1)
    theta = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in load_file(tiny_model_path / "model.safetensors").items()
    }
    asyncio.run(policy.refresh(1, theta, complete=True))
    save_file(theta, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_model_path / "config.json").read_bytes())
    refreshed = writer.write(asked)
    checked(checkpoint_writer(str(tmp_path), basis, WRITE, "float32", torch.device("cpu")), refreshed, asked)
    assert largest_difference(refreshed, results) > 1e-4  # another theta
    asyncio.run(_install_and_act(policy, refreshed[0], "after"))


@pytest.mark.cpu_paths
def test_only_the_layers_under_delta_are_held_a_second_time_and_only_where_vllm_packs(
    policy: VLLMPolicy, tiny_model_path: Path
) -> None:
    """On a CPU vLLM packs its matmuls' weights: two of six layers are copied.

    The largest tensor, the embedding, is vLLM's own.
    """
    weights = policy._weights
    layers = load_file(tiny_model_path / "model.safetensors")
    under = [
        tensor
        for name, tensor in layers.items()
        if name.startswith(("model.layers.4.", "model.layers.5.")) and "_proj" in name
    ]
    parts = [part for layer in weights._copies for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    copied = [part.weight for part in parts if part.weight is not None]
    assert len(copied) == 2 * 4
    assert sum(copy.nbytes for copy in copied) == sum(tensor.nbytes for tensor in under)
    assert weights.model.head.data_ptr() == weights._vllm_model.lm_head.weight.data_ptr()
    assert all(layer.qkv.weight is None for layer in weights.model.layers[:4]), (
        "vLLM shows the weights of the lower layers: use them, drop the copies"
    )


def test_a_write_runs_on_the_step_thread_and_its_errors_leave_the_engine_alive(
    policy: VLLMPolicy, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    original = BatchedWriter.write
    monkeypatch.setattr(
        BatchedWriter,
        "write",
        lambda self, asked: names.append(threading.current_thread().name) or original(self, asked),
    )
    writer = policy.writer(WRITE)
    with pytest.raises(WriterError, match="write of episode x: no examples"):
        writer.write([WriteRequest("x", zero(basis), ())])
    assert names == ["the vLLM engine"]
    assert writer.write(requests(basis))[0].outcome == "accepted"
    key = AdapterKey(policy.version, "none", 0)
    assert asyncio.run(policy.generate((5, 6, 7), Sampling(0.0, 4, 0, "act"), key)).token_ids
    assert policy.stats().seconds["write"] > 0


def test_an_episode_cut_after_any_write_goes_on_from_its_log_to_the_bit(
    policy: VLLMPolicy, basis: Basis, tiny_model_path: Path
) -> None:
    """On the real engine and writer: the tokens and the B equal those of the episode that was not cut.

    The past is not sampled again, and a receipt proves its last revision.
    """
    from transformers import AutoTokenizer

    environment = RecallEnvironment(
        RecallConfig(sessions=7, facts_per_session=3, questions=1, filler_sentences=1)
    )
    memory = MemoryConfig(
        policy="summary_write", max_context_tokens=110, max_extract_tokens=16, max_summary_tokens=16
    )
    rollout = Rollout(
        policy,
        policy.writer(WRITE),
        environment,
        ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path)),
        WRITE,
        RolloutConfig(),
        4,
        surroundings(256, 8, EmbedderConfig()),
        basis.id,
        "worker-0",
    )
    task = next(environment.tasks("train", 0, 0))

    def play(name: str, past: tuple[Event, ...]) -> tuple[Trajectory, Recovered, GroupJournal]:
        journal = GroupJournal(10**6)
        recovery = Recovery(journal, bool(past), {0: Progress(policy.version, past)} if past else {})
        request = RolloutRequest(task, name, 1, memory, 1.0, 8, seed=3)
        group, recovered = asyncio.run(asyncio.wait_for(rollout.recoverable_group(request, recovery), 120))
        assert not group.failed, group.failed
        return group.trajectories[0], recovered, journal

    uncut, _, journal = play("uncut", ())
    events = journal.progress("uncut")[0].events
    cuts = [place + 1 for place, event in enumerate(events) if isinstance(event, Written)]
    assert len(cuts) >= 2 and [record.outcome for record in uncut.writes] == ["accepted"] * len(cuts)
    for number, cut in enumerate(cuts):
        before = policy.stats()
        trajectory, recovered, _ = play(f"cut-{number}", events[:cut])
        after = policy.stats()
        assert recovered == Recovered(1, 0)
        assert after.generated_tokens - before.generated_tokens == sum(
            len(event.token_ids) for event in events[cut:] if isinstance(event, Sampled)
        )
        assert (
            after.installs - before.installs
            == after.receipts_passed - before.receipts_passed
            == len(cuts) - number
        )
        for ours, theirs in zip(trajectory.segments, uncut.segments, strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids.tolist() and ours.revision == theirs.revision
        for rebuilt, lost in zip(trajectory.revisions, uncut.revisions, strict=True):
            assert all(np.array_equal(rebuilt.b[name], lost.b[name]) for name in lost.b)
