"""Preserved replies: the writer against a plain loop with the same KL term, and what the term is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from actors.episodes.preservation import in_turn
from actors.fast_weights.delta import DeltaInjector, stack, zero
from actors.protocols import WriterError
from actors.types import FastWeights, WriteExample, WriteRequest
from actors.write.kernels import kl_pass
from actors.write.lower_layers import LowerLayers, LowerOutput
from actors.write.steps import minibatches, preserved_in_turn
from actors.write.writer import BatchedWriter
from configs.load import load_config
from configs.schema import PreserveConfig, WriteConfig
from configs.shipped import shipped
from tests.unit.test_natural_write import sensitive
from tests.unit.write_cases import basis_of, examples, frozen, ragged_requests, tiny_model, write
from tests.unit.write_reference import largest_difference, mean_kl, reference

PRESERVE = PreserveConfig(weight=0.7, per_step=2)
SGD = WriteConfig(optimizer="sgd", learning_rate=0.005, epochs=3, batch_size=3, preserve=PRESERVE)
ADAM = WriteConfig(optimizer="adam", learning_rate=2e-3, epochs=3, batch_size=3, preserve=PRESERVE)


def preserving(requests: list[WriteRequest]) -> list[WriteRequest]:
    """The first two episodes preserve five replies and one; the third preserves none."""
    replies = [examples(7, 5), examples(8, 1), ()]
    return [
        replace(request, preserved=kept, seed=seed)
        for seed, (request, kept) in enumerate(zip(requests, replies, strict=True), start=3)
    ]


@pytest.mark.parametrize("config", [SGD, ADAM], ids=lambda config: config.optimizer)
@pytest.mark.parametrize("shared_prefix", [0, 9])
def test_it_equals_the_peft_loop_with_the_same_kl_term(config: WriteConfig, shared_prefix: int) -> None:
    """SGD: |dB| <= 1e-6. Adam: |dB| <= 1 % of one step, see test_writer.py."""
    config = replace(config, preserve=replace(PRESERVE, per_step=1 if shared_prefix else 2))
    basis = basis_of(tiny_model())
    requests = preserving(ragged_requests(basis, shared_prefix))
    if config.preserve.per_step == 2:  # a window is never larger than what there is
        requests[1] = replace(requests[1], preserved=examples(8, 2))
    for request, result in zip(requests, write(requests, config), strict=True):
        expected, before, after = reference(request, basis, config, "llama")
        assert result.outcome == "accepted", result.reason
        bound = 1e-6 if config.optimizer == "sgd" else 0.01 * config.learning_rate
        assert largest_difference(result.weights, expected) <= bound
        assert result.loss_before == pytest.approx(before, abs=2e-5)
        assert result.loss_after == pytest.approx(after, abs=2e-4)
    without = write([replace(request, preserved=()) for request in requests], config)[0]
    expected, _, _ = reference(requests[0], basis, config, "llama")
    assert largest_difference(without.weights, expected) > 1e-4, "the term does nothing here"


def test_the_kl_and_its_gradient_are_autograds() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(7, 16, generator=draw, requires_grad=True)
    head, weights = torch.randn(50, 16, generator=draw), torch.rand(7, generator=draw)
    base = [torch.randn(rows, 50, generator=draw).log_softmax(-1) for rows in (4, 1, 2)]
    kl, gradient = kl_pass(states.detach(), head, base, weights)
    now = (states @ head.T).log_softmax(-1)
    wanted = nn.functional.kl_div(now, torch.cat(base), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(kl, wanted, atol=1e-5)
    (expected,) = torch.autograd.grad((weights * wanted).sum(), states)
    assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "natural"])
def test_what_is_preserved_changes_less(optimizer: str) -> None:
    """Of two writes of the same cards, the one with the term ends nearer to the untouched model."""
    model = tiny_model(head_scale=2)
    basis = sensitive(model)
    rate = {"sgd": 0.05}.get(optimizer, 4e-3)
    config = WriteConfig(optimizer=optimizer, learning_rate=rate, epochs=15)  # type: ignore[arg-type]
    kept = examples(21, 6)
    request = WriteRequest("a", zero(basis), examples(1, 3), kept)
    harms = []
    for weight in (0.0, 4.0):
        writer = BatchedWriter(
            frozen(model), basis, replace(config, preserve=PreserveConfig(weight=weight, per_step=6))
        )
        (result,) = writer.write([request])
        assert result.loss_after < 0.9 * result.loss_before
        harms.append(kl_of(model, result.weights, basis, kept))
        assert result.preserved_used == 6
        # measured before the last step, which moves little
        assert result.preserved_kl == pytest.approx(harms[-1], rel=0.2)
    assert harms[1] < 0.75 * harms[0], harms


@pytest.mark.parametrize(("epochs", "per_step", "used"), [(1, 2, 2), (2, 2, 4), (5, 2, 6), (1, 9, 6)])
def test_a_short_write_does_not_come_to_all_of_the_offered_replies(
    epochs: int, per_step: int, used: int
) -> None:
    model = tiny_model()
    basis, kept = basis_of(model), examples(21, 6)
    config = replace(SGD, epochs=epochs, preserve=PreserveConfig(weight=1.0, per_step=per_step))
    request = WriteRequest("a", zero(basis), examples(1, 3), kept)
    (result,) = BatchedWriter(frozen(model), basis, config).write([request])
    assert (result.outcome, result.preserved_used) == ("accepted", used)


def kl_of(model: nn.Module, weights: FastWeights, basis, kept) -> float:  # type: ignore[no-untyped-def]
    injector = DeltaInjector(model, basis)
    with torch.no_grad(), injector.use(stack([weights], basis)):
        total = float(mean_kl(model, tiny_model(head_scale=2), kept))
    injector.remove()
    return total


def test_the_base_is_remembered_and_a_full_store_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    basis = basis_of(model)
    (request, *_) = preserving(ragged_requests(basis))
    writer = BatchedWriter(frozen(model), basis, SGD)
    first, again = writer.write([request])[0], writer.write([request])[0]
    monkeypatch.setattr("actors.write.writer._KEPT_TOKENS", 2)
    small = BatchedWriter(frozen(model), basis, SGD)
    small.write([request])
    forgetful = small.write([request])[0]
    for other in (again, forgetful):
        assert largest_difference(other.weights, dict(first.weights.b)) == 0


def test_a_known_text_ends_the_write() -> None:
    """The same cards again take no step, and B stays; new cards beside them are learnt all the same.

    How many steps they take is not compared: the last bit of a batch decides it, and processors differ there.
    """
    model = tiny_model()
    basis = sensitive(model)
    config = WriteConfig(optimizer="natural", epochs=60, step_kl=0.5, known_loss=0.3)
    writer = BatchedWriter(frozen(model), basis, config)
    first = writer.write([WriteRequest("a", zero(basis), examples(1, 3))])[0]
    assert first.outcome == "accepted" and 0 < first.steps < 60
    assert first.loss_after <= 0.3
    again, other = writer.write(
        [
            WriteRequest("a", first.weights, examples(1, 3)),
            WriteRequest("b", zero(basis), examples(5, 3)),
        ]
    )
    assert again.steps == 0 and 0 < other.steps < 60 and other.loss_after <= 0.3
    moved = largest_difference(again.weights, dict(first.weights.b))
    assert moved == 0 and again.weights.revision == 2


def test_a_write_goes_on_while_it_harms_what_it_preserves() -> None:
    """A reply to a card's own question cannot be kept: that write takes all its steps."""
    model = tiny_model(head_scale=2)
    basis = sensitive(model)
    (card,) = examples(1, 1)
    other = WriteExample(card.prompt_ids, tuple(token + 1 for token in card.answer_ids))
    config = WriteConfig(
        optimizer="natural", epochs=40, step_kl=0.5, known_loss=0.4, preserve=PreserveConfig(weight=1e-3)
    )
    requests = [WriteRequest("a", zero(basis), (card,)), WriteRequest("b", zero(basis), (card,), (other,))]
    without, light = BatchedWriter(frozen(model), basis, config).write(requests)
    assert max(light.steps, without.steps) < 40, "a light weight makes no harm that counts"
    heavy = replace(config, preserve=PreserveConfig(weight=1.0))
    assert BatchedWriter(frozen(model), basis, heavy).write(requests)[1].steps == 40


@pytest.mark.parametrize("name", ["recall_rl", "recall_asking", "quickstart"])
def test_writes_of_few_steps_use_the_whole_pool_among_them(name: str) -> None:
    config = load_config(shipped()[name], []).write
    preserve = config.preserve
    pool, beside = examples(3, preserve.questions + preserve.extractions + preserve.everyday), examples(4, 2)
    order = in_turn(pool, beside, preserve.per_step)
    request = WriteRequest("a", FastWeights("basis", 0, {}), examples(1, 4), order)
    writes = [preserved_in_turn(replace(request, seed=seed), config) for seed in range(100)]
    assert {reply for write in writes for reply in write} == {*pool, *beside}
    assert writes[7] == preserved_in_turn(replace(request, seed=7), config), "a replay preserves the same"
    for replies in writes:
        steps = [replies[i : i + preserve.per_step] for i in range(0, len(replies), preserve.per_step)]
        assert len(steps) == config.epochs and all(len(step) == preserve.per_step for step in steps)
        own = [sum(reply in beside for reply in step) for step in steps]
        assert own == [preserve.per_step // 2] * len(steps), "each step has its share of what is beside"


def test_what_no_step_of_a_write_preserves_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool has more replies than a write of few steps takes: the rest costs no pass."""
    basis, read = basis_of(tiny_model()), []

    def reading(self: LowerLayers, *parts: Sequence[tuple[int, WriteExample]]) -> tuple[LowerOutput, ...]:
        read.extend(example for _, example in parts[0])
        return lowest(self, *parts)

    lowest = LowerLayers.read
    monkeypatch.setattr(LowerLayers, "read", reading)
    pool, cards = examples(8, 9), examples(1, 2)
    config = replace(SGD, epochs=2)  # two steps of two replies
    write([WriteRequest("a", zero(basis), cards, pool, seed=5)], config)
    assert read == [*cards, *pool[2:6]]  # from place 5 % 4 of the four that the pool has


def test_minibatches_are_drawn_anew_by_the_seed() -> None:
    rows = list(range(10))
    epochs = [minibatches(rows, 4, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(row for batch in epoch for row in batch) == rows for epoch in epochs)
    assert all([len(batch) for batch in epoch] == [4, 4, 2] for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3
    assert minibatches(rows, 4, 1, 0) == epochs[0]
    assert minibatches(rows, 10, 1, 0) == [rows]


def test_a_preserved_reply_that_cannot_be_used_is_refused() -> None:
    basis = basis_of(tiny_model())
    bad = WriteExample((1, 2), ())
    with pytest.raises(WriterError, match="preserved reply 0 needs a prompt and an answer"):
        write([WriteRequest("a", zero(basis), examples(1, 2), (bad,))], SGD)
