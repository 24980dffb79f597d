"""The objective against numbers worked out by hand, and against the vanilla policy gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from configs.schema import ObjectiveConfig
from learner.objective import TokenBatch, TokenStatistics, policy_objective


def batch(
    logp: Tensor,
    old: list[float],
    engine: list[float],
    advantage: list[float],
    reference: Tensor | None = None,
) -> TokenBatch:
    count = len(logp)
    return TokenBatch(
        logp,
        torch.tensor(old),
        torch.tensor(engine),
        reference,
        torch.ones(count),
        torch.tensor(advantage),
        torch.full((count,), 0.25),
    )


def logs(*values: float) -> list[float]:
    return [math.log(value) for value in values]


def test_clipping_on_both_sides_by_hand() -> None:
    # rho = 1.5, 1.1, 0.5, 0.9 with A = 1, 1, -1, -1 and clip 0.2/0.2: tokens 0 and 2 are clipped to 1.2, 0.8
    logp = torch.tensor(logs(0.15, 0.11, 0.05, 0.09), requires_grad=True)
    config = ObjectiveConfig(importance="none")
    loss, statistics = policy_objective(
        batch(logp, logs(0.1, 0.1, 0.1, 0.1), logs(0.1, 0.1, 0.1, 0.1), [1, 1, -1, -1]), config
    )
    assert loss.item() == pytest.approx(-0.25 * (1.2 + 1.1 - 0.8 - 0.9), rel=1e-5)
    assert statistics.clipped == 2
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([0, -0.25 * 1.1, 0, 0.25 * 0.9], rel=1e-5)


def test_the_clip_is_one_sided() -> None:
    # rho = 0.5 with A > 0 and rho = 1.5 with A < 0 move back towards the old policy: never clipped.
    logp = torch.tensor(logs(0.05, 0.15), requires_grad=True)
    loss, statistics = policy_objective(
        batch(logp, logs(0.1, 0.1), logs(0.1, 0.1), [1, -1]), ObjectiveConfig(importance="none")
    )
    assert statistics.clipped == 0
    assert loss.item() == pytest.approx(-0.25 * (0.5 - 1.5), rel=1e-5)


@pytest.mark.parametrize(("probability", "advantage", "clipped"), [(0.15, 1.0, 1.3), (0.05, -1.0, 0.6)])
def test_each_side_has_its_own_clip(probability: float, advantage: float, clipped: float) -> None:
    # token by token: the loss of both together, 1.3 - 0.6, would be 1.4 - 0.7 with the two bounds swapped
    config = ObjectiveConfig(importance="none", clip_low=0.4, clip_high=0.3)
    old = logs(0.1)
    loss, statistics = policy_objective(batch(torch.tensor(logs(probability)), old, old, [advantage]), config)
    assert loss.item() == pytest.approx(-0.25 * advantage * clipped, rel=1e-5)
    assert statistics.clipped == 1


def test_truncated_importance_by_hand() -> None:
    # old learner over engine: 0.15 / 0.1 = 1.5, 0.3 / 0.1 = 3 -> 2 (the cap), 0.05 / 0.1 = 0.5
    # the weight is a constant of the gradient
    logp = torch.tensor(logs(0.15, 0.3, 0.05), requires_grad=True)
    engine = logs(0.1, 0.1, 0.1)
    loss, statistics = policy_objective(
        batch(logp, logp.tolist(), engine, [1, 1, -1]), ObjectiveConfig(importance_cap=2.0)
    )
    assert loss.item() == pytest.approx(-0.25 * (1.5 + 2 - 0.5), rel=1e-5)
    assert statistics.truncated == 1
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-0.25 * 1.5, -0.25 * 2, 0.25 * 0.5], rel=1e-5)
    assert statistics.ratio == pytest.approx(5.0, rel=1e-5)
    assert (statistics.ratio_min, statistics.ratio_max) == pytest.approx((0.5, 3.0), rel=1e-5)
    assert statistics.difference_max == pytest.approx(math.log(3), rel=1e-5)


def test_k3_by_hand() -> None:
    # reference over policy 2: k3 = 2 - ln 2 - 1. Its gradient with respect to log pi is 1 - 2, and that of
    # the ratio k3: together -ln 2, which is what KL(pi || ref) has for a token of pi
    logp = torch.tensor(logs(0.1), requires_grad=True)
    reference = torch.tensor(logs(0.2))
    config = ObjectiveConfig(importance="none", kl_coefficient=0.5)
    loss, statistics = policy_objective(batch(logp, logp.tolist(), logp.tolist(), [0.0], reference), config)
    assert statistics.kl == pytest.approx(0.25 * (1 - math.log(2)), rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * statistics.kl, rel=1e-5)
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([0.5 * 0.25 * -math.log(2)], rel=1e-5)


def test_the_kl_is_that_of_the_present_policy_whoever_sampled_the_tokens() -> None:
    """Each token of a vocabulary once, weighted by how often the old policy samples it: the exact mean."""
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, generator=draw)).requires_grad_()
    old, reference = (torch.randn(12, generator=draw).log_softmax(0) for _ in range(2))
    logp = logits.log_softmax(0)
    exact = (logp.exp() * (logp - reference)).sum()
    nothing = torch.zeros(12)
    values = TokenBatch(logp, old, old, reference, nothing, nothing, scale=old.exp())
    loss, statistics = policy_objective(values, ObjectiveConfig(kl_coefficient=1.0))
    assert statistics.kl == pytest.approx(exact.item(), rel=1e-5)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(exact, logits)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_token_that_the_policy_has_left_does_not_rule_the_kl() -> None:
    """It was likely when it was sampled, and is for the reference: exp(15) nats without the ratio."""
    logp = torch.tensor([-15.0, -0.1], requires_grad=True)
    config = ObjectiveConfig(kl_coefficient=1.0)
    reference = torch.tensor([-0.1, -0.1])
    loss, statistics = policy_objective(batch(logp, [-0.1, -0.1], [-0.1, -0.1], [0, 0], reference), config)
    loss.backward()
    assert logp.grad is not None
    assert 0 < statistics.kl < 0.3 and logp.grad.abs().max() < 0.1


def test_on_policy_gradient_is_the_vanilla_policy_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 11, generator=draw, requires_grad=True)
    taken = torch.randint(0, 11, (32, 1), generator=draw)
    advantage, scale = torch.randn(32, generator=draw), torch.rand(32, generator=draw)
    logp = logits.log_softmax(-1).gather(-1, taken).squeeze(-1)
    values = TokenBatch(logp, logp.detach(), logp.detach(), None, torch.zeros(32), advantage, scale)
    loss, statistics = policy_objective(values, ObjectiveConfig())
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(scale * advantage * logp).sum(), logits)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert (statistics.ratio_min, statistics.ratio_max) == (1.0, 1.0)
    assert (statistics.clipped, statistics.truncated) == (0.0, 0.0)


def test_a_far_ratio_does_not_turn_into_nan() -> None:
    logp = torch.tensor([-1.0, -200.0], requires_grad=True)
    loss, _ = policy_objective(batch(logp, [-200.0, -1.0], [-200.0, -1.0], [1, -1]), ObjectiveConfig())
    loss.backward()
    assert logp.grad is not None and bool(torch.isfinite(logp.grad).all()) and math.isfinite(loss.item())


def test_no_tokens_have_a_loss_of_zero_with_a_gradient() -> None:
    logp = torch.zeros(0, requires_grad=True)
    loss, statistics = policy_objective(batch(logp, [], [], []), ObjectiveConfig())
    loss.backward()
    assert loss.item() == 0 and statistics == TokenStatistics.none()


def test_statistics_of_parts_merge_to_the_whole() -> None:
    logp = torch.tensor(logs(0.15, 0.11, 0.05, 0.09))
    old, engine, advantage = logs(0.1, 0.1, 0.1, 0.1), logs(0.12, 0.02, 0.1, 0.1), [1.0, 1.0, -1.0, -1.0]
    _, whole = policy_objective(batch(logp, old, engine, advantage), ObjectiveConfig())
    merged = TokenStatistics.none()
    for part in (slice(0, 1), slice(1, 4)):
        tokens = batch(logp[part], old[part], engine[part], advantage[part])
        merged = merged.merge(policy_objective(tokens, ObjectiveConfig())[1])
    assert merged.sums == pytest.approx(whole.sums) and merged.maxima == pytest.approx(whole.maxima)
