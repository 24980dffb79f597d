"""The batched writer against a plain PEFT + torch.optim loop, on a tiny random model of each family."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from actors.fast_weights.basis import make_basis
from actors.fast_weights.delta import Basis, BasisError, DeltaInjector, stack, zero
from actors.protocols import WriterError
from actors.types import FastWeights, WriteExample, WriteRequest
from actors.write.frozen_llama import OwnedWeights
from actors.write.lower_layers import LowerLayers
from actors.write.steps import minibatches
from actors.write.writer import BatchedWriter
from configs.schema import WriteConfig
from tests.unit.write_cases import (
    CPU,
    basis_of,
    examples,
    frozen,
    ragged_requests,
    random_weights,
    tiny_model,
    write,
)
from tests.unit.write_reference import largest_difference, mean_loss, reference

SGD = WriteConfig(optimizer="sgd", learning_rate=0.005, epochs=3, batch_size=3)
ADAM = WriteConfig(optimizer="adam", learning_rate=2e-3, epochs=3, batch_size=3)


@pytest.mark.parametrize(
    ("config", "family"),
    [(SGD, "llama"), (SGD, "mistral"), (SGD, "qwen2"), (SGD, "qwen3"), (ADAM, "llama")],
    ids=lambda value: getattr(value, "optimizer", value),
)
@pytest.mark.parametrize("shared_prefix", [0, 9])
def test_batched_writes_equal_the_sequential_peft_loop(
    config: WriteConfig, family: str, shared_prefix: int
) -> None:
    """SGD: |dB| <= 1e-6. Adam: |dB| <= 1 % of one step (lr).

    Adam's first step is lr * sign(gradient), so the rounding of gradients near 0 shows.
    """
    basis = basis_of(tiny_model(family))
    requests = ragged_requests(basis, shared_prefix)
    results = write(requests, config, family)
    for request, result, steps in zip(requests, results, (9, 3, 3), strict=True):
        expected, before, after = reference(request, basis, config, family)
        assert result.outcome == "accepted", result.reason
        assert (result.steps, result.weights.revision) == (steps, request.weights.revision + 1)
        assert result.weights.basis_id == basis.id
        assert largest_difference(result.weights, expected) <= (
            1e-6 if config is SGD else 0.01 * config.learning_rate
        )
        moved = max(float(np.abs(matrix).max()) for matrix in expected.values())
        assert moved > 1e-3, "the write is too small for the bounds above to mean anything"
        assert result.loss_before == pytest.approx(before, abs=2e-5)
        assert result.loss_after == pytest.approx(after, abs=2e-4)
        assert all(matrix.dtype == np.float32 for matrix in result.weights.b.values())


@pytest.mark.parametrize("last_layers", [1, 2])
@pytest.mark.parametrize("config", [SGD, ADAM], ids=lambda config: config.optimizer)
def test_writes_that_move_a_equal_the_peft_loop_with_both_trained(
    config: WriteConfig, last_layers: int
) -> None:
    """Against the loop in float64: two writes in a row, the second from the first's A and B.

    SGD: |dB|, |dA| <= 1e-5. Adam, as above: 2 % of lr.
    """
    model, frozen_basis = tiny_model(), basis_of(tiny_model(), last_layers)
    basis = make_basis(frozen_basis.kind, frozen_basis.a, frozen_basis.d_out, train_a=True)
    writer = BatchedWriter(frozen(model), basis, config)
    requests = [
        WriteRequest("a", zero(basis), examples(1, 7, 9)),
        WriteRequest("b", zero(basis), examples(2, 3, 9)),
    ]
    tolerance = 1e-5 if config is SGD else 0.02 * config.learning_rate
    for _ in range(2):
        results = writer.write(requests)
        for request, result in zip(requests, results, strict=True):
            b, a = both_trained(request, basis, config)
            assert result.outcome == "accepted", result.reason
            assert max(float(np.abs(result.weights.b[name] - b[name]).max()) for name in b) <= tolerance
            assert max(float(np.abs(result.weights.a[name] - a[name]).max()) for name in a) <= tolerance
            begin = {name: request.weights.a.get(name, matrix.numpy()) for name, matrix in basis.a.items()}
            moved = min(float(np.abs(a[name] - begin[name]).max()) for name in a)
            assert moved > 3 * tolerance, "an A moved too little for the bounds above to mean anything"
            assert result.probe is not None
            injector = DeltaInjector(model, basis)
            with torch.no_grad(), injector.use(stack([result.weights], basis)):
                table = model(torch.tensor([result.probe.token_ids])).logits[0].log_softmax(-1)
            injector.remove()
            first = len(result.probe.token_ids) - len(result.probe.after)
            expected = [
                table[place - 1, result.probe.token_ids[place]].item()
                for place in range(first, len(result.probe.token_ids))
            ]
            assert result.probe.after == pytest.approx(expected, abs=1e-4)
        requests = [
            WriteRequest(request.episode_id, result.weights, request.examples[:2])
            for request, result in zip(requests, results, strict=True)
        ]


def both_trained(
    request: WriteRequest, basis: Basis, config: WriteConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """B and A of a plain PEFT loop in float64 that trains both, as LoRA usually does."""
    lora = LoraConfig(
        r=basis.rank, lora_alpha=basis.rank, lora_dropout=0.0, bias="none", target_modules=list(basis.modules)
    )
    model = get_peft_model(tiny_model(), lora).double().eval()
    layers = {name: model.base_model.model.get_submodule(name) for name in basis.modules}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(
            torch.from_numpy(request.weights.a[name]) if request.weights.a else basis.a[name]
        )
        if request.weights.revision:
            layer.lora_B["default"].weight.data.copy_(torch.from_numpy(request.weights.b[name]))
    sides = [
        {name: getattr(layer, side)["default"].weight for name, layer in layers.items()}
        for side in ("lora_B", "lora_A")
    ]
    optimizer = (torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam)(
        [*sides[0].values(), *sides[1].values()], lr=config.learning_rate
    )
    for epoch in range(config.epochs):
        for batch in minibatches(range(len(request.examples)), config.batch_size, request.seed, epoch):
            optimizer.zero_grad()
            mean_loss(model, [request.examples[i] for i in batch]).backward()
            optimizer.step()
    b, a = ({name: matrix.detach().numpy() for name, matrix in side.items()} for side in sides)
    return b, a


@pytest.mark.parametrize("last_layers", [1, 3])
def test_number_of_adapted_layers_and_small_chunks_change_nothing(last_layers: int) -> None:
    basis = basis_of(tiny_model(), last_layers)
    requests = ragged_requests(basis, shared_prefix=9)
    small = WriteConfig(optimizer="sgd", learning_rate=0.005, epochs=3, batch_size=3, chunk_tokens=20)
    for request, result in zip(requests, write(requests, small, last_layers=last_layers), strict=True):
        assert largest_difference(result.weights, reference(request, basis, SGD, "llama")[0]) <= 1e-6


def test_prompts_that_are_the_shared_prefix_or_equal() -> None:
    """The prefix must leave the prompt's last token, which predicts an answer, to its row.

    Also when one prompt begins another, and for a lone example.
    """
    basis = basis_of(tiny_model())
    prompt = tuple(range(9))
    cases = (
        (
            WriteExample(prompt, (3, 4)),
            WriteExample((*prompt, 50, 51), (5,)),
            WriteExample(prompt, (6, 7, 8)),
        ),
        (WriteExample(prompt, (3, 4)),),
        (WriteExample((7,), (3, 4)), WriteExample((7,), (9,))),
    )
    for cards in cases:
        request = WriteRequest("a", zero(basis), cards)
        assert (
            largest_difference(write([request], SGD)[0].weights, reference(request, basis, SGD, "llama")[0])
            <= 1e-6
        )


@pytest.mark.parametrize("last_layers", [1, 3])
@pytest.mark.parametrize("chunk_tokens", [20, 2048])
def test_cards_behind_others_equal_the_loop_that_runs_each_whole(last_layers: int, chunk_tokens: int) -> None:
    """Each card plainly, behind another, and behind two. Minibatches part them as they like."""
    basis = basis_of(tiny_model(), last_layers)
    requests = [
        WriteRequest(name, zero(basis), behind_others(examples(seed, 3, shared_prefix=4)), seed=seed)
        for seed, name in enumerate("ab", start=1)
    ]
    for batch_size in (4, 16):
        config = replace(SGD, batch_size=batch_size, chunk_tokens=chunk_tokens)
        for request, result in zip(requests, write(requests, config, last_layers=last_layers), strict=True):
            expected = reference(request, basis, config, "llama")[0]
            assert largest_difference(result.weights, expected) <= 1e-6


def behind_others(cards: tuple[WriteExample, ...]) -> tuple[WriteExample, ...]:
    a, b, c = cards
    rows = [*cards]
    for chain in ((a, b), (a, b, c), (c, a), (b, c)):
        tokens = [token for card in chain for token in (*card.prompt_ids, *card.answer_ids)]
        end = len(tokens) - len(chain[-1].answer_ids)
        rows.append(WriteExample(tuple(tokens[:end]), tuple(tokens[end:])))
    return tuple(rows)


def test_companions_do_not_change_an_episode() -> None:
    basis = basis_of(tiny_model())
    requests = ragged_requests(basis)
    together = write(requests, SGD)
    for request, result in zip(requests, together, strict=True):
        alone = write([request], SGD)[0]
        assert largest_difference(result.weights, dict(alone.weights.b)) <= 1e-7
    assert write([], SGD) == []


def test_a_diverging_companion_does_not_poison_the_others() -> None:
    """NaN in one episode's B stays there."""
    basis = basis_of(tiny_model())
    good = ragged_requests(basis)
    huge = FastWeights(
        basis.id,
        3,
        {name: np.full((rows, basis.rank), 1e30, np.float32) for name, rows in basis.d_out.items()},
    )
    bad = WriteRequest("bad", huge, examples(9, 4))
    results = write([good[0], bad, good[1]], SGD)
    assert results[1].outcome == "rolled_back"
    assert results[1].weights is huge
    assert results[1].steps == 1 and "at step 1 of 6" in results[1].reason  # it takes no further step
    assert largest_difference(results[0].weights, dict(write([good[0]], SGD)[0].weights.b)) <= 1e-7
    assert largest_difference(results[2].weights, dict(write([good[1]], SGD)[0].weights.b)) <= 1e-7


def test_refresh_loads_new_values_or_refuses_whole() -> None:
    """Some tensors or all; q, k, v and gate, up are held joined."""
    model = tiny_model()
    basis = basis_of(model)
    owned = OwnedWeights(
        {name: parameter.clone() for name, parameter in model.state_dict().items()}, torch.float32, CPU
    )
    theta_view = owned.model(model.config)
    writer = BatchedWriter(theta_view, basis, SGD)
    request = WriteRequest("a", zero(basis), examples(1, 3))
    before = writer.write([request])[0].loss_before
    torch.manual_seed(1)
    theta = {
        name: parameter + 0.05 * torch.randn_like(parameter)
        for name, parameter in tiny_model().named_parameters()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(WriterError, match=rf"{name} has shape \(2, 2\), not \(48, 32\)"):
        owned.refresh({**theta, name: torch.zeros(2, 2)})
    assert writer.write([request])[0].loss_before == before
    changed = {key: value for key, value in theta.items() if ".3." in key}
    for tensors in (changed, theta):
        owned.refresh(tensors)
        writer = BatchedWriter(theta_view, basis, SGD)
        fresh = tiny_model()
        fresh.load_state_dict({**tiny_model().state_dict(), **tensors}, strict=False)
        with torch.no_grad():
            assert writer.write([request])[0].loss_before == pytest.approx(
                mean_loss(fresh, request.examples).item(), abs=2e-5
            )
        assert abs(mean_loss(fresh, request.examples).item() - before) > 1e-2


def test_rehearsed_examples_are_not_read_again_and_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second write brings two old examples and a new one: the lower layers run the new one alone.

    B is that of a writer that remembers nothing.
    """
    model = tiny_model()
    basis = basis_of(model)
    old = examples(1, 2, shared_prefix=5)
    new = examples(2, 1, shared_prefix=3)
    writer = BatchedWriter(frozen(model), basis, SGD)
    first = writer.write([WriteRequest("a", zero(basis), old)])[0]
    again = WriteRequest("a", first.weights, new + old)
    ran: list[int] = []
    original = LowerLayers._pass
    monkeypatch.setattr(
        LowerLayers, "_pass", lambda self, ids, pattern: ran.append(len(ids)) or original(self, ids, pattern)
    )
    second = writer.write([again])[0]
    # The shortest example is an old one, so its probe is remembered too.
    assert ran == [len(new[0].prompt_ids) + len(new[0].answer_ids) - 1]
    monkeypatch.undo()
    fresh = BatchedWriter(frozen(model), basis, SGD).write([again])[0]
    assert largest_difference(second.weights, dict(fresh.weights.b)) <= 1e-7
    assert second.loss_after == pytest.approx(fresh.loss_after, abs=1e-6)


def test_unusable_requests_are_errors_in_one_line() -> None:
    model = tiny_model()
    basis = basis_of(model)
    writer = BatchedWriter(frozen(model), basis, WriteConfig(max_example_tokens=16))
    for bad, message in (
        ((WriteExample(tuple(range(15)), (1, 2)),), "example 0 has 17 tokens, at most 16"),
        ((WriteExample((), (1,)),), "needs a prompt and an answer"),
        ((WriteExample((1,), ()),), "needs a prompt and an answer"),
        ((), "no examples"),
    ):
        with pytest.raises(WriterError, match=f"write of episode a: .*{message}"):
            writer.write([WriteRequest("a", zero(basis), bad)])
    identity = BatchedWriter(frozen(model), basis, WriteConfig(epochs=0))
    assert identity.write([]) == []
    with pytest.raises(
        WriterError, match=r"write of episode a: write\.epochs=0 makes every write the identity"
    ):
        identity.write([WriteRequest("a", zero(basis), examples(1, 1))])
    with pytest.raises(BasisError, match="belong to basis"):
        writer.write([WriteRequest("a", FastWeights("other", 0, {}), examples(1, 1))])


def test_examples_stay_within_the_window_of_sliding_attention() -> None:
    """The flat stream attends to all that came before, so a longer example would not be the model's."""
    model = tiny_model("mistral")
    model.config.sliding_window = 8  # type: ignore[union-attr]
    basis = basis_of(model)
    writer = BatchedWriter(frozen(model), basis, SGD)
    fits, too_long = WriteExample(tuple(range(6)), (1, 2)), WriteExample(tuple(range(7)), (1, 2))
    assert writer.write([WriteRequest("a", zero(basis), (fits,))])[0].outcome == "accepted"
    with pytest.raises(WriterError, match="example 0 has 9 tokens, at most 8 are allowed"):
        writer.write([WriteRequest("a", zero(basis), (too_long,))])


def test_a_trace_is_the_write_with_its_weights_after_each_step() -> None:
    model = tiny_model()
    basis = basis_of(model)
    writer = BatchedWriter(frozen(model), basis, SGD)
    request = WriteRequest("b", random_weights(basis, 5), examples(1, 7))
    result, steps = writer.trace(request)
    (written,) = writer.write([request])
    assert len(steps) == result.steps == 9
    assert {weights.revision for weights in steps} == {3}
    assert largest_difference(steps[-1], dict(result.weights.b)) == 0
    assert largest_difference(written.weights, dict(result.weights.b)) == 0
    moves = [largest_difference(later, dict(earlier.b)) for earlier, later in pairwise(steps)]
    assert min(moves) > 0


def test_unsupported_architecture_is_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    with pytest.raises(
        WriterError, match="'gpt2' is not supported by the writer: use one of llama, mistral, qwen2, qwen3"
    ):
        OwnedWeights(model.state_dict(), torch.float32, CPU).model(model.config)


def test_bfloat16_model_keeps_b_in_float32() -> None:
    model = tiny_model()
    basis = basis_of(model)
    result = BatchedWriter(frozen(model, torch.bfloat16), basis, SGD).write(
        [WriteRequest("a", zero(basis), examples(1, 6))]
    )[0]
    assert result.outcome == "accepted"
    assert result.loss_after < result.loss_before
    matrix = torch.from_numpy(result.weights.b[basis.modules[0]])
    assert matrix.dtype == torch.float32
    assert not torch.equal(matrix.bfloat16().float(), matrix)
