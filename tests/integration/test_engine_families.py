"""Every supported model family on the real engine against transformers: act, write, install, refresh.

test_engine.py does Llama, in depth. Each family has a process of its own, because a vLLM engine that ends
takes its process's torch.distributed with it. The child measures, the test judges.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.types import AdapterKey, FastWeights, Sampling, WriteExample, WriteRequest
from cluster.bench.harness import child
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig, WriteConfig
from tests.conftest import TOKENIZER_FILES
from tests.integration.engine_reference import distance, prompt, written

EXACT = 1e-4  # nats, float32: what engine and transformers may differ by (measured: 1e-5)
LIMIT = 256
SIZE = 0.02  # of B: moves these models' log-probs by tenths of a nat
WRITE = WriteConfig(learning_rate=0.02)
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": False},  # its query, key and value have biases; heads of 32
    "qwen3": {
        "head_dim": 64,
        "tie_word_embeddings": True,
    },  # norms on queries and keys; heads wider than hidden / heads
    "mistral": {"head_dim": 64, "tie_word_embeddings": False, "sliding_window": None},
}


def make_model(family: str, folder: Path, tokenizer_from: Path) -> None:
    """Write a random model of the family to ``folder``.

    Draws are wide, for biases and norms too, so that a part left out shows in the log-probs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])
    ).float()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(mean=1.0, std=0.2, generator=draw)
            else:
                parameter.normal_(std=0.2 if "embed" in name else 0.1, generator=draw)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer_from / file, folder / file)


@dataclass(frozen=True)
class Difference:
    """Largest distances between the engine and transformers, in nats.

    base, generated, under_delta: of log-probs, without and with Delta. most_likely: greedy tokens are the
    same. moved: how far Delta moves the log-probs of transformers.
    write: between B of a write on the engine's weights and B of a plain SGD loop, in units of its largest
    entry. answers: between the write's log-probs and those of transformers under the new B. The receipt has
    passed by then. learned: nats that the write took off the loss.
    """

    base: float
    generated: float
    most_likely: bool
    under_delta: float
    moved: float
    write: float
    answers: float
    learned: float


class Merged:
    """The family's model in transformers. Delta is added to its weights, W + B A, without Engram's code."""

    def __init__(self, path: Path, basis: Basis) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._basis = basis

    def write(self, examples: Sequence[WriteExample]) -> dict[str, torch.Tensor]:
        """B after WRITE's epochs of plain SGD on the mean loss of all answer tokens."""
        b = {
            name: torch.zeros(rows, self._basis.rank, requires_grad=True)
            for name, rows in self._basis.d_out.items()
        }
        optimizer = torch.optim.SGD(b.values(), lr=WRITE.learning_rate)
        for _ in range(WRITE.epochs):
            optimizer.zero_grad()
            merged = {
                f"{name}.weight": self.model.get_parameter(f"{name}.weight").detach()
                + matrix @ self._basis.a[name]
                for name, matrix in b.items()
            }
            losses = []
            for example in examples:
                ids = torch.tensor([example.prompt_ids + example.answer_ids])
                logits = torch.func.functional_call(self.model, merged, (ids,)).logits
                answer_logits = logits[0, len(example.prompt_ids) - 1 : -1]
                targets = torch.tensor(example.answer_ids)
                losses.append(cross_entropy(answer_logits, targets, reduction="none"))
            torch.cat(losses).mean().backward()
            optimizer.step()
        return {name: matrix.detach() for name, matrix in b.items()}

    def table(self, ids: Sequence[int], weights: FastWeights | None) -> torch.Tensor:
        """log_softmax after each token of ``ids``: [len(ids), vocabulary]."""
        kept = {}
        with torch.no_grad():
            for name, b in {} if weights is None else weights.b.items():
                parameter = self.model.get_parameter(f"{name}.weight")
                kept[name] = parameter.clone()
                parameter += torch.from_numpy(b) @ self._basis.a[name]
            logits = self.model(torch.tensor([list(ids)])).logits[0]
            for name, before in kept.items():
                self.model.get_parameter(f"{name}.weight").copy_(before)
        return logits.log_softmax(-1)

    def logprobs(self, ids: Sequence[int], weights: FastWeights | None) -> list[float]:
        """Log-probs of tokens 1..n-1 given those before."""
        return self.table(ids, weights)[:-1].gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].tolist()


class Served:
    """The child's engine and its reference."""

    def __init__(self, path: Path) -> None:
        from actors.engine.policy import VLLMPolicy

        self._basis = compute_basis_from_checkpoint(path, FastWeightsConfig(), seed=0)
        config = EngineConfig(slots=2, max_model_tokens=LIMIT, kv_cache_gib=0.0625)
        self._policy = VLLMPolicy(path, ModelConfig(), config, self._basis, (), version=0, threads=1, seed=0)
        self._reference = Merged(path, self._basis)

    def compare(self, seed: int) -> Difference:
        """Under the theta in force and a fresh Delta."""
        return asyncio.run(self._compare(seed))

    def refresh(self) -> None:
        """Engine and reference move to the next version, every tensor changed."""
        draw = torch.Generator().manual_seed(5)
        model = self._reference.model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=draw)
        tensors: Mapping[str, torch.Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }
        asyncio.run(self._policy.refresh(self._policy.version + 1, tensors, complete=True))

    async def _compare(self, seed: int) -> Difference:
        policy, ids = self._policy, prompt(seed, 150)
        base, key = AdapterKey(policy.version, "any", 0), AdapterKey(policy.version, f"written-{seed}", 1)
        weights = written(self._basis, 1, seed, SIZE)
        await policy.install(key, weights, None)
        plain, under_delta = await policy.score(ids, base), await policy.score(ids, key)
        generation = await policy.generate(ids, Sampling(0.0, 12, 0, "act"), key)
        whole = [*ids, *generation.token_ids]
        table = self._reference.table(whole, weights)[len(ids) - 1 : -1]
        sampled = table.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0].tolist()
        expected = self._reference.logprobs(ids, None), self._reference.logprobs(ids, weights)
        write, answers, learned = await self._write(seed)
        return Difference(
            base=distance(plain, expected[0]),
            generated=distance(generation.logprobs, sampled),
            most_likely=table.argmax(-1).tolist() == list(generation.token_ids),
            under_delta=distance(under_delta, expected[1]),
            moved=distance(*expected),
            write=write,
            answers=answers,
            learned=learned,
        )

    async def _write(self, seed: int) -> tuple[float, float, float]:
        """``write``, ``answers`` and ``learned`` of Difference."""
        examples = tuple(
            WriteExample(tuple(prompt(seed + i, 20 + i)), tuple(prompt(seed + i, 6 + i)))
            for i in range(10, 14)
        )
        request = WriteRequest(f"writer-{seed}", zero(self._basis), examples)
        (result,) = await asyncio.to_thread(self._policy.writer(WRITE).write, [request])
        assert result.probe is not None, result.reason
        key = AdapterKey(self._policy.version, request.episode_id, 1)
        await self._policy.install(key, result.weights, result.probe)  # raises ReceiptError
        expected = self._reference.write(examples)
        size = max(float(matrix.abs().max()) for matrix in expected.values())
        differences = [torch.from_numpy(result.weights.b[name]) - matrix for name, matrix in expected.items()]
        write = max(float(difference.abs().max()) for difference in differences) / size
        answers = self._reference.logprobs(result.probe.token_ids, result.weights)[-len(result.probe.after) :]
        return write, distance(answers, result.probe.after), result.loss_before - result.loss_after


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_acts_writes_installs_and_refreshes_as_transformers(
    family: str, model_path: Path, tmp_path: Path
) -> None:
    make_model(family, tmp_path, model_path)
    with child(f"the engine of {family}", Served, (tmp_path,)) as served:
        before: Difference = served.call("compare", (1,), 120)
        served.call("refresh", (), 120)
        after: Difference = served.call("compare", (2,), 120)
    for difference in (before, after):
        assert max(difference.base, difference.generated, difference.under_delta) < EXACT, difference
        assert difference.most_likely, difference
        assert difference.moved > 1000 * EXACT, "the Delta is too small for this test to mean anything"
        assert difference.write < 1e-4, difference
        assert difference.answers < EXACT, difference
        assert difference.learned > 1000 * EXACT, "the write is too small for this test to mean anything"
