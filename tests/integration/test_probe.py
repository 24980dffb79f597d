"""The probe on SmolLM2-135M: a strong write is remembered, and nothing written is nothing damaged.

The engine says what the merged model says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from actors.engine.policy import VLLMPolicy
from actors.environments.recall import SYSTEM_PROMPT
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import AdapterKey, Flashcard, Sampling, WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.writer import BatchedWriter
from cluster.probe.cards import examples_of, recall_cards, unrelated_pieces
from cluster.probe.examiner import RUN_ON, Examiner
from cluster.probe.reading import Reader
from cluster.probe.values import Card, Point
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig, WriteConfig

pytestmark = pytest.mark.engine_in_process
CARDS = 3
STEPS = 12


@dataclass(frozen=True, eq=False)
class Probed:
    """Three facts written by Adam 1e-3, and what was measured before and after."""

    basis: Basis
    chat: ChatFormat
    cards: tuple[Card, ...]
    result: WriteResult
    before: Point
    after: Point
    last_step: Point


@pytest.fixture(scope="module")
def probed(model_path: Path) -> Probed:
    model: FrozenLlama = read_model(str(model_path), "float32", torch.device("cpu"))
    basis = compute_basis_from_checkpoint(model_path, FastWeightsConfig(), seed=0)
    chat = ChatFormat(AutoTokenizer.from_pretrained(model_path))
    cards = tuple(
        Card(card.question, card.answer, card.paraphrases[:1]) for card in recall_cards(CARDS, "eval", 0)
    )
    shipped = unrelated_pieces(None)
    pieces = [next(piece for piece in shipped if piece.kind == kind) for kind in ("text", "reply")]
    reader = Reader(model, chat.stop_token_ids)
    examiner = Examiner(reader, chat, SYSTEM_PROMPT, [cards], pieces)
    write = WriteConfig(optimizer="adam", learning_rate=1e-3, epochs=STEPS)
    examples = examples_of("flashcards", cards, (), SYSTEM_PROMPT, chat, write)
    request = WriteRequest("probe", zero(basis), examples)
    result, steps = BatchedWriter(model, basis, write).trace(request)
    assert len(steps) == STEPS
    return Probed(
        basis,
        chat,
        cards,
        result,
        before=examiner.examine(basis, zero(basis), 0, 0),
        after=examiner.examine(basis, result.weights, 1, STEPS),
        last_step=examiner.examine(basis, steps[-1], 1, STEPS),
    )


def test_a_strong_write_is_remembered_and_costs_something(probed: Probed) -> None:
    assert probed.result.outcome == "accepted"
    assert sum(probed.before.recall(False, "em").values()) == 0
    assert sum(probed.after.recall(False, "em").values()) >= 2
    assert probed.after.loss(False) < 0.3 * probed.before.loss(False)
    assert probed.after.loss(True) < probed.before.loss(True)
    assert probed.result.loss_before == pytest.approx(probed.before.loss(False), abs=1e-3)
    assert probed.result.loss_after == pytest.approx(probed.after.loss(False), abs=1e-3)
    assert probed.after.text("text", "kl") > 1e-3


def test_nothing_written_is_no_damage_exactly(probed: Probed) -> None:
    assert [(text.damage, text.kl) for text in probed.before.texts] == [(0.0, 0.0)] * 2


def test_the_last_step_is_the_write_to_the_bit(probed: Probed) -> None:
    assert probed.last_step == probed.after


def test_the_natural_write_remembers_more_wordings_and_harms_less(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare, on six facts, ten steps of Adam at its tuned rate with fifteen natural steps (its row's)."""
    monkeypatch.setattr("actors.fast_weights.sensitivity.SAMPLES", 16)
    model: FrozenLlama = read_model(str(model_path), "float32", torch.device("cpu"))
    basis = compute_basis_from_checkpoint(model_path, FastWeightsConfig(sensitivity_rank=64), seed=0)
    chat = ChatFormat(AutoTokenizer.from_pretrained(model_path))
    cards = [replace(card, paraphrases=card.paraphrases[:2]) for card in recall_cards(6, "eval", 0)]
    reader = Reader(model, chat.stop_token_ids)
    examiner = Examiner(reader, chat, SYSTEM_PROMPT, [cards], unrelated_pieces(None))

    def after(write: WriteConfig) -> Point:
        examples = examples_of("flashcards", cards, (), SYSTEM_PROMPT, chat, write)
        request = WriteRequest("probe", zero(basis), examples)
        (result,) = BatchedWriter(model, basis, write).write([request])
        assert result.outcome == "accepted"
        return examiner.examine(basis, result.weights, 1, write.epochs)

    adam = after(WriteConfig(optimizer="adam", learning_rate=1e-3, epochs=10))
    natural = after(WriteConfig(optimizer="natural", epochs=15, step_kl=0.02))
    assert sum(natural.recall(False, "em").values()) >= sum(adam.recall(False, "em").values()) > 0
    assert sum(natural.recall(True, "em").values()) >= sum(adam.recall(True, "em").values()) > 0
    assert natural.text("text", "kl") < 0.2 * adam.text("text", "kl")
    assert natural.text("reply", "kl") < 0.5 * adam.text("reply", "kl")


@pytest.fixture(scope="module")
def policy(model_path: Path, probed: Probed) -> Iterator[VLLMPolicy]:
    config, stop = EngineConfig(slots=8, max_model_tokens=256, kv_cache_gib=0.25), probed.chat.stop_token_ids
    engine = VLLMPolicy(model_path, ModelConfig(), config, probed.basis, stop, version=0, threads=1, seed=0)
    yield engine
    engine.close()


def test_the_engine_says_what_the_merged_model_says(policy: VLLMPolicy, probed: Probed) -> None:
    chat, written = probed.chat, AdapterKey(0, "probe", 1)
    examples = [
        write_example(Flashcard(question, card.answer), SYSTEM_PROMPT, chat)
        for card in probed.cards
        for question in (card.question, *card.paraphrases)
    ]
    sampling = Sampling(0.0, max(len(example.answer_ids) for example in examples) + RUN_ON, 0, "act")

    async def answers(key: AdapterKey) -> list[str]:
        generations = await asyncio.gather(
            *(policy.generate(example.prompt_ids, sampling, key) for example in examples)
        )
        return [chat.decode(generation.token_ids).strip() for generation in generations]

    async def story() -> tuple[list[str], list[str]]:
        await policy.install(written, probed.result.weights, probed.result.probe)
        return await answers(AdapterKey(0, "probe", 0)), await answers(written)

    before, after = asyncio.run(story())

    def said(point: Point) -> list[str]:
        return [asked.said for card in point.cards for asked in (card.written, *card.paraphrased)]

    assert (before, after) == (said(probed.before), said(probed.after))
    assert before != after
