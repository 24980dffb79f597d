"""The kernels of a write against plain references: attention in a flat stream, the products, the head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from actors.write.flat_batch import FlatBatch, RowSpan, make_flat_batch
from actors.write.kernels import head_pass

CPU = torch.device("cpu")
# The last two rows of the third group continue its first row, and one another.
GROUPS = (
    (RowSpan(5, 2), RowSpan(3, 3)),
    (RowSpan(4, 1),),
    (RowSpan(1, 1), RowSpan(6, 2), RowSpan(2, 1), RowSpan(4, 2, parent=0), RowSpan(3, 1, parent=3)),
)
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def places(batch: FlatBatch, prefix: int) -> list[tuple[list[int], list[int], RowSpan]]:
    """For each row: where what it continues and its own tokens are, counted by hand."""
    counted: list[tuple[list[int], list[int], RowSpan]] = []
    start = 0
    for group in GROUPS:
        first, own = len(counted), start + prefix
        for row in group:
            before = list(range(start, start + prefix))
            if row.parent is not None:
                before = counted[first + row.parent][0] + counted[first + row.parent][1]
            counted.append((before, list(range(own, own + row.length)), row))
            own += row.length
        start = own
    assert start == batch.offsets[-1] == len(batch.positions)
    return counted


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence [t, heads, d] -> [t, heads * d], causal, in float64."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / WIDTH**0.5
    scores = scores.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double()).flatten(1).float()


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_row_attends_to_what_it_continues_and_to_itself_and_to_nobody_else(prefix: int) -> None:
    batch = make_flat_batch(prefix, GROUPS, CPU)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch.offsets[-1], heads, WIDTH, generator=draw) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    attended = batch.attend(q, k, v)
    answered = batch.attend_answers(batch.answers_of(q), k, v)
    taken = 0
    for before, own, row in places(batch, prefix):
        index = torch.tensor(before + own)
        expected = plain_attention(q[index], k[index], v[index])
        assert batch.positions[index].tolist() == list(range(len(index)))
        assert torch.allclose(attended[index], expected, atol=1e-6)  # the prefix of its group included
        assert torch.allclose(answered[taken : taken + row.answers], expected[-row.answers :], atol=1e-6)
        taken += row.answers
    assert taken == len(answered) == batch.answer_offsets[-1]


@pytest.mark.parametrize("count", [3, 300])  # one block of logits, and two
@pytest.mark.parametrize("scale", [1, 60])  # logits of hundreds: exp of them is no float32
def test_the_heads_gradient_is_that_of_the_cross_entropy(count: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(1)
    states = (scale * torch.randn(count, 16, generator=draw)).requires_grad_()
    head = torch.randn(53, 16, generator=draw)
    targets, weights = torch.randint(0, 53, (count,), generator=draw), torch.rand(count, generator=draw)
    expected = -functional.cross_entropy(states @ head.T, targets, reduction="none")
    (-(weights * expected).sum()).backward()
    logprobs, gradient = head_pass(states.detach(), head, targets, weights)
    assert torch.allclose(logprobs, expected.detach(), atol=1e-5 * scale)
    assert gradient is not None and states.grad is not None
    assert torch.allclose(gradient, states.grad, atol=1e-5)
    assert head_pass(states.detach(), head, targets, None)[1] is None
    # with a bound, tokens that are likelier give no gradient
    most = float(expected.detach().median())
    hard = head_pass(states.detach(), head, targets, weights, most)[1]
    assert hard is not None
    is_hard = expected.detach() <= most
    assert 0 < int(is_hard.sum()) < count
    assert torch.allclose(hard, torch.where(is_hard[:, None], states.grad, 0.0), atol=1e-5)
