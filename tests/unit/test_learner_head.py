"""The chunked head against plain full logits: values, both gradients, and what it may hold in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from learner import head

TOKENS, WIDTH, VOCABULARY = 37, 24, 211


def case(dtype: torch.dtype, trained: bool) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """States, head, targets, and the weight of each log-prob in the loss (one is 0, as the clip does)."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=False)
    layer.weight.data = torch.randn(VOCABULARY, WIDTH, generator=draw)
    layer = layer.to(dtype).requires_grad_(trained)
    states = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_(True)
    incoming = torch.randn(TOKENS, generator=draw)
    incoming[3] = 0
    return states, layer, torch.randint(VOCABULARY, (TOKENS,), generator=draw), incoming


def plain(states: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The reference: all logits at once."""
    logs = (linear(states, weight).float() / temperature).log_softmax(-1)
    return logs.gather(-1, targets[:, None]).squeeze(-1), -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equal_to_full_logits(
    dtype: torch.dtype, tolerance: float, temperature: float, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative differences of norms: 1e-5 in float32; in bfloat16 that of its rounding."""
    monkeypatch.setattr(head, "_CHUNK", 5 * VOCABULARY)  # eight chunks, the last of them short
    states, layer, targets, incoming = case(dtype, trained)
    inputs = [states, layer.weight] if trained else [states]
    expected_logp, expected_entropy = plain(states, layer.weight, targets, temperature)
    expected = torch.autograd.grad((incoming * expected_logp).sum(), inputs)
    logp, entropy = head.TokenHead(layer)(states, targets, temperature)
    assert not entropy.requires_grad and logp.dtype == entropy.dtype == torch.float32
    found = torch.autograd.grad((incoming * logp).sum(), inputs)
    values, wanted = (logp, entropy, *found), (expected_logp, expected_entropy, *expected)
    for value, right in zip(values, wanted, strict=True):
        assert value.dtype == right.dtype
        assert float((value - right).detach().float().norm() / right.detach().float().norm()) < tolerance


def test_each_token_may_have_a_temperature_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK", 5 * VOCABULARY)
    states, layer, targets, incoming = case(torch.float32, trained=True)
    inputs = [states, layer.weight]
    heat = torch.where(torch.arange(TOKENS) % 3 == 0, 0.7, 1.3)
    mixed = head.TokenHead(layer)(states, targets, heat)
    logs = (linear(states, layer.weight) / heat[:, None]).log_softmax(-1)
    expected = logs.gather(-1, targets[:, None]).squeeze(-1)
    found = torch.autograd.grad((incoming * mixed[0]).sum(), inputs)
    right = torch.autograd.grad((incoming * expected).sum(), inputs)
    assert torch.allclose(mixed[0], expected, atol=1e-5)
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(found, right, strict=True))
    equal = head.TokenHead(layer)(states, targets, torch.full((TOKENS,), 0.7))
    assert torch.equal(equal[0], head.TokenHead(layer)(states, targets, 0.7)[0])


def test_values_without_gradients_and_of_no_tokens() -> None:
    states, layer, targets, _ = case(torch.float32, trained=True)
    module = head.TokenHead(layer)
    with torch.no_grad():
        logp, entropy = module(states, targets, 1.0)
    assert not logp.requires_grad and torch.equal(logp, module(states, targets, 1.0)[0])
    assert torch.allclose(entropy, plain(states, layer.weight, targets, 1.0)[1], atol=1e-5)
    none, _ = module(states[:0], targets[:0], 1.0)
    none.sum().backward()
    assert len(none) == 0 and not layer.weight.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("trained", [True, False])
def test_no_array_is_larger_than_a_chunk(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's dispatcher sees every tensor that forward and backward make: none is [tokens, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            tensors = [
                each for each in (made if isinstance(made, tuple) else (made,)) if isinstance(each, Tensor)
            ]
            largest = max([largest, *(tensor.numel() for tensor in tensors)])
            return made

    monkeypatch.setattr(head, "_CHUNK", 4 * VOCABULARY)
    states, layer, targets, incoming = case(torch.float32, trained)
    with Watch():
        (incoming * head.TokenHead(layer)(states, targets, 1.0)[0]).sum().backward()
    # the weight's transpose or gradient; TOKENS * VOCABULARY is more
    assert largest == layer.weight.numel() > 4 * VOCABULARY


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="has a bias"):
        head.TokenHead(nn.Linear(2, 3))
