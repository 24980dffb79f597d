"""Episodes that live through a refresh: versions of tokens, the age of the group, and the learner's ratio."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from actors.environments.recall import RecallEnvironment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.text.chat_template import ChatFormat
from actors.text.context import Context
from actors.types import ActionSpan, AdapterKey, Generation, Sampling, TrajectoryGroup
from configs.bounds import BoundError
from configs.schema import MemoryConfig, ObjectiveConfig, RecallConfig, RolloutConfig, RunConfig, WriteConfig
from learner.batch import pad
from learner.objective import TokenBatch, policy_objective
from learner.types import Row
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

ENVIRONMENT = RecallEnvironment(
    RecallConfig(sessions=2, facts_per_session=4, questions=2, filler_sentences=1)
)
REQUEST = RolloutRequest(
    next(ENVIRONMENT.tasks("train", 0, 0)), "g", 2, MemoryConfig(max_context_tokens=50), 1.0, 8, seed=1
)
CARDS = '[{"instruction": "Who moved?", "output": "Nora"}]'


class Refreshed(ScriptedPolicy):
    """Goes to the next version in the middle of the replies whose numbers (from 0) are in ``during``."""

    def __init__(self, chat: ChatFormat, during: set[int]) -> None:
        super().__init__(self._reply)
        self._chat, self._during = chat, during

    def _reply(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        spoken = sampled(self._chat.reply(CARDS if sampling.max_tokens > 8 else "Lisbon"))
        versions = [self.version] * len(spoken.token_ids)
        if len(self.calls) - 1 in self._during:
            self.version += 1
            versions[1:] = [self.version] * (len(versions) - 1)
        return Generation(spoken.token_ids, spoken.logprobs, "stop", tuple(versions))


def play(chat: ChatFormat, policy: ScriptedPolicy, writer: ScriptedWriter) -> TrajectoryGroup:
    config = RolloutConfig(refresh="in_flight", episode_timeout_s=30)
    rollout = Rollout(
        policy, writer, ENVIRONMENT, chat, WriteConfig(), config, 1, SURROUNDINGS, "basis", "worker-0"
    )
    return asyncio.run(rollout.group(REQUEST))


def test_an_episode_goes_on_each_token_keeps_its_version_and_the_group_is_as_old_as_its_oldest_token(
    chat: ChatFormat,
) -> None:
    # In the first episode's second extraction and its first answer. The second episode begins on version 5.
    policy = Refreshed(chat, during={1, 2})
    group = play(chat, policy, ScriptedWriter())
    assert not group.failed and group.policy_version == 3
    first, second = group.trajectories
    assert (first.policy_version, second.policy_version) == (3, 5)
    assert [segment.policy_version for segment in first.segments] == [3, 3, 4]
    whole, cut, last = (segment.spans for segment in first.segments)
    assert [span.version for span in whole] == [None]
    assert [(span.kind, span.version) for span in cut] == [("extract", None), ("extract", 4)]
    assert cut[0].end - cut[0].start == 1
    assert [(span.kind, span.version) for span in last] == [("act", None), ("act", 5), ("act", 5)]
    # the episode's adapters keep their names
    assert {adapter.policy_version for _, _, adapter in policy.calls[:4]} == {3}
    assert policy.installed == {} and set(policy.released) == {"v3/g.0@1", "v3/g.0@2", "v5/g.1@1", "v5/g.1@2"}


def test_a_write_whose_probe_is_of_other_weights_asks_for_no_receipt(chat: ChatFormat) -> None:
    policy = Refreshed(chat, during=set())

    class Slow(ScriptedWriter):
        def _result(self, request: object) -> object:  # type: ignore[override]
            if len(self.batches) == 2:
                policy.version += 1
            return super()._result(request)  # type: ignore[arg-type]

    group = play(chat, policy, Slow())
    assert not group.failed and [probe is None for probe in policy.probes] == [False, True, False, False]


def test_a_segment_is_dated_by_its_oldest_token_and_a_drained_one_by_its_episode() -> None:
    mixed = Context([1])
    mixed.act(Generation((4, 5, 6), (-1.0, -2.0, -3.0), "stop", (7, 7, 8)), "act")
    segment = mixed.close(9, 2)
    assert segment.policy_version == 7
    assert segment.spans == (ActionSpan(1, 3, "act"), ActionSpan(3, 4, "act", version=8))
    drained = Context([1])
    drained.act(Generation((4,), (-1.0,), "stop"), "act")
    assert drained.close(9, 2).policy_version == 9
    with pytest.raises(ValueError, match="2 tokens came with 2 log-probs and 1 versions"):
        Generation((4, 5), (-1.0, -2.0), "stop", (7,))


def test_the_ratio_of_each_token_is_against_the_weights_that_sampled_it() -> None:
    """The gradient with respect to a token's log-prob is -A * scale * pi_now / pi_that_sampled_it.

    The recorded log-prob is all it needs.
    """
    sampled_by_old, sampled_by_new, now = -1.0, -1.4, -1.5
    context = Context([1, 2])
    context.act(Generation((4, 5), (sampled_by_old, sampled_by_new), "stop", (3, 4)), "act")
    batch = pad([Row(context.close(3, 0), None, advantage=2.0, scale=0.5)], temperature=1.0)
    engine_logp = torch.from_numpy(batch.engine_logprobs[batch.loss_mask])
    logp = torch.full((2,), now, requires_grad=True)
    advantage, scale = torch.full((2,), 2.0), torch.full((2,), 0.5)
    tokens = TokenBatch(logp, logp.detach(), engine_logp, None, torch.zeros(2), advantage, scale)
    policy_objective(tokens, ObjectiveConfig())[0].backward()
    assert logp.grad is not None
    expected = [-0.5 * 2.0 * float(np.exp(now - behaviour)) for behaviour in (sampled_by_old, sampled_by_new)]
    assert logp.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_settings_that_do_not_go_with_it_are_refused_in_one_line() -> None:
    refused = r"is not allowed: it must be %s with rollout.refresh=in_flight"
    with pytest.raises(BoundError, match=f"recover_episodes=True {refused % 'false'}; a write log"):
        RolloutConfig(refresh="in_flight", recover_episodes=True)
    with pytest.raises(BoundError, match=f"objective.importance='none' {refused % 'truncated'}"):
        RunConfig(rollout=RolloutConfig(refresh="in_flight"), objective=ObjectiveConfig(importance="none"))
