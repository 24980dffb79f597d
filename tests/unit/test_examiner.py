"""The probe's measurements, against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.environments.recall import SYSTEM_PROMPT
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, DeltaInjector, stack, zero
from actors.text.flashcards import write_example
from actors.types import FastWeights, Flashcard, WriteExample
from cluster.probe.examiner import RUN_ON
from cluster.probe.reading import Reader, merged_layers
from cluster.probe.values import Point
from configs.schema import FastWeightsConfig
from tests.unit.test_probe import FAST, PIECES, tiny

__all__ = ["tiny"]  # fixtures


class Reference:
    """The same model in transformers, one text at a time. Hooks add Delta."""

    def __init__(self, path: Path, basis: Basis) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._injector, self._basis = DeltaInjector(self._model, basis), basis

    def table(self, ids: tuple[int, ...], weights: FastWeights) -> Tensor:
        with torch.no_grad(), self._injector.use(stack([weights], self._basis)):
            return self._model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def of(self, example: WriteExample, weights: FastWeights) -> Tensor:
        """Log-probs [answer, vocabulary]."""
        ids = (*example.prompt_ids, *example.answer_ids[:-1])
        return self.table(ids, weights)[len(example.prompt_ids) - 1 :]

    def greedy(
        self, prompt: tuple[int, ...], weights: FastWeights, stop: tuple[int, ...], most: int
    ) -> tuple[int, ...]:
        said: tuple[int, ...] = ()
        while len(said) < most and (not said or said[-1] not in stop):
            said = (*said, int(self.table(prompt + said, weights)[-1].argmax()))
        return said


def test_an_examination_is_what_transformers_says(tiny: SimpleNamespace) -> None:
    reference = Reference(tiny.path, tiny.basis)
    point: Point = tiny.examiner.examine(tiny.basis, tiny.weights, 2, 1)
    assert [(card.card, card.write) for card in point.cards] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    for score, card in zip(point.cards, tiny.cards, strict=True):
        ways = zip((score.written, *score.paraphrased), (card.question, *card.paraphrases), strict=True)
        for asked, question in ways:
            example = write_example(Flashcard(question, card.answer), SYSTEM_PROMPT, tiny.chat)
            target = torch.tensor(example.answer_ids)[:, None]
            logprobs = reference.of(example, tiny.weights).gather(1, target)
            assert asked.loss == pytest.approx(-float(logprobs.mean()), abs=1e-4)
            group = tiny.cards[(score.write - 1) * 2 :][:2]
            most = max(len(tiny.chat.reply(other.answer)) for other in group) + RUN_ON
            said = reference.greedy(example.prompt_ids, tiny.weights, tiny.chat.stop_token_ids, most)
            assert asked.said == tiny.chat.decode(said).strip()
    text = tiny.chat.encode(PIECES[0].text)
    reply = write_example(Flashcard(PIECES[1].prompt, PIECES[1].text), SYSTEM_PROMPT, tiny.chat)
    for score, example in zip(point.texts, (WriteExample(text[:1], text[1:]), reply), strict=True):
        base, now = (reference.of(example, weights) for weights in (zero(tiny.basis), tiny.weights))
        target = torch.tensor(example.answer_ids)[:, None]
        assert score.damage == pytest.approx(float((base - now).gather(1, target).mean()), abs=1e-4)
        assert score.kl == pytest.approx(float((base.exp() * (base - now)).sum(-1).mean()), abs=1e-4)
        assert score.kl > 1e-3


def test_decoding_goes_on_where_the_draft_was_wrong(tiny: SimpleNamespace) -> None:
    """The drafts are right in part, as a whole and not at all. The greedy tokens are the same."""
    reference = Reference(tiny.path, tiny.basis)
    layers = merged_layers(tiny.model, tiny.basis, tiny.weights)
    prompts = [tiny.chat.encode(text) for text in ("The third of many", "One", "Nobody knew that the")]
    right = [reference.greedy(prompt, tiny.weights, (), 6) for prompt in prompts]
    drafts = [(*right[0][:3], 11, 12), right[1], (7, 8, 9)]
    examples = [WriteExample(prompt, draft) for prompt, draft in zip(prompts, drafts, strict=True)]
    said: dict[int, tuple[int, ...]] = {}
    for block in tiny.reader.prepare(examples, tiny.basis.first_layer, answered=True):
        answers = Reader(tiny.model, ()).answer(block, tiny.reader.read(block, layers), layers, 6)
        said.update(zip(block.numbers, answers, strict=True))
    assert [said[i] for i in range(3)] == right


def test_delta_zero_does_no_damage_to_the_bit(tiny: SimpleNamespace) -> None:
    other = FastWeightsConfig(last_layers=6, projections=("down_proj",))
    for basis in (tiny.basis, compute_basis_from_checkpoint(tiny.path, other, seed=0)):
        point = tiny.examiner.examine(basis, zero(basis), 0, 0)
        assert len(point.cards) == 4
        assert [(text.damage, text.kl) for text in point.texts] == [(0.0, 0.0), (0.0, 0.0)]


def test_an_a_of_its_own_is_merged_too(tiny: SimpleNamespace) -> None:
    basis = compute_basis_from_checkpoint(tiny.path, replace(FAST, train_a=True), seed=0)
    twice = FastWeights(basis.id, 1, tiny.weights.b, {name: 2 * a.numpy() for name, a in basis.a.items()})
    doubled = FastWeights(tiny.basis.id, 1, {name: 2 * b for name, b in tiny.weights.b.items()})
    own_a = tiny.examiner.examine(basis, twice, 2, 1)
    scaled_b = tiny.examiner.examine(tiny.basis, doubled, 2, 1)
    assert [card.written.said for card in own_a.cards] == [card.written.said for card in scaled_b.cards]
    assert own_a.loss(False) == pytest.approx(scaled_b.loss(False), abs=1e-5)
