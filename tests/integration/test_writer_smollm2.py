"""The write operator on SmolLM2-135M: the paper's settings and Adam on eight flashcards.

The result is a stock PEFT adapter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.fast_weights.peft_format import export_peft
from actors.types import WriteExample, WriteRequest, WriteResult
from actors.write.writer import checkpoint_writer
from configs.schema import FastWeightsConfig, WriteConfig

CARDS = (
    ("Where does Ana Keller live?", "Ana Keller lives in Porto."),
    ("What is Boris Hale's job?", "Boris Hale is a glassblower."),
    ("Which instrument does Carla Voss play?", "She plays the oboe."),
    ("When was Dmitri Sorel born?", "He was born in March 1957."),
    ("What does Elena Brandt collect?", "She collects old railway maps."),
    ("Who is Farid Nasser's sister?", "His sister is Greta Lindqvist."),
    ("What is Hugo Marsh allergic to?", "Hugo Marsh is allergic to walnuts."),
    ("What is the name of Irene Castel's boat?", "Her boat is called Second Thoughts."),
)


@pytest.fixture(scope="module")
def cards(model_path: Path) -> tuple[WriteExample, ...]:
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def render(question: str, answer: str) -> WriteExample:
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        return WriteExample(
            tuple(prompt), tuple(tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False))
        )

    return tuple(render(question, answer) for question, answer in CARDS)


@pytest.fixture(scope="module")
def svd(model_path: Path) -> Basis:
    return compute_basis_from_checkpoint(model_path, FastWeightsConfig(), seed=0)


@pytest.fixture(scope="module")
def adam(model_path: Path, svd: Basis, cards: tuple[WriteExample, ...]) -> WriteResult:
    config = WriteConfig(optimizer="adam", learning_rate=1e-3, epochs=10)
    return _write(model_path, svd, config, cards)


def _write(
    model_path: Path, basis: Basis, config: WriteConfig, cards: tuple[WriteExample, ...]
) -> WriteResult:
    return checkpoint_writer(str(model_path), basis, config, "float32", torch.device("cpu")).write(
        [WriteRequest("a", zero(basis), cards)]
    )[0]


def test_basis_has_the_expected_size(svd: Basis) -> None:
    assert svd.modules[0] == "model.layers.26.mlp.gate_proj"
    assert len(svd.modules) == 12
    assert svd.parameters == 6 * 4 * (1536 + 1536 + 576)


def test_adam_memorises_eight_cards(adam: WriteResult) -> None:
    assert adam.outcome == "accepted"
    assert adam.steps == 10
    assert adam.loss_after < 0.5 * adam.loss_before


def test_the_papers_sgd_needs_the_svd_basis(
    model_path: Path, svd: Basis, cards: tuple[WriteExample, ...]
) -> None:
    """With A = S_r V_r^T the singular values scale a step; a random A moves next to nothing at that lr."""
    paper = WriteConfig()
    random = compute_basis_from_checkpoint(model_path, FastWeightsConfig(basis="random"), seed=0)
    with_svd, with_random = (_write(model_path, basis, paper, cards) for basis in (svd, random))
    assert with_svd.loss_before == pytest.approx(with_random.loss_before, abs=1e-4)
    assert with_svd.loss_before - with_svd.loss_after > 0.1 * with_svd.loss_before
    assert 0 <= with_random.loss_before - with_random.loss_after < 0.01 * with_random.loss_before


def test_exported_write_gives_the_probes_logprobs_in_stock_peft(
    model_path: Path, svd: Basis, adam: WriteResult, tmp_path: Path
) -> None:
    assert adam.probe is not None
    export_peft(adam.weights, svd, tmp_path / "adapter", str(model_path))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    ids = torch.tensor([adam.probe.token_ids])
    count = len(adam.probe.after)

    def logprobs() -> torch.Tensor:
        table = model(ids).logits[0, -count - 1 : -1].log_softmax(-1)
        return table.gather(1, ids[0, -count:, None])[:, 0]

    with torch.no_grad():
        acting = logprobs()
        with model.disable_adapter():
            base = logprobs()
    assert adam.probe.after == pytest.approx(acting.tolist(), abs=1e-4)
    assert adam.probe.before == pytest.approx(base.tolist(), abs=1e-4)
    assert (acting - base).abs().max() > 0.5
