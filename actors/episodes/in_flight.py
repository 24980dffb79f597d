"""An episode that lives through refreshes of its worker (``rollout.refresh: in_flight``): its engine changes theta between two steps and it goes on.

    ... sample under theta_3 + Delta | refresh to 4 | sample on under theta_4 + Delta ...         one reply, two policy versions, told token by token

What is kept: the tokens so far with the log-probs of the weights that sampled them (so the learner's ratio is right for each token), and the adapters
under the names that they have, which carry the version on which the episode began. What is computed anew: keys and values of running requests and the
prefix cache, so that every log-prob is that of one theta. What is given up: the paper (TMEM, arXiv 2606.04536) fixes theta within a rollout; here A
and the B of earlier writes were made for older weights than those that they are added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from actors.protocols import AsyncWriter, Policy
from actors.types import (
    AdapterKey,
    FastWeights,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    Trajectory,
    WriteRequest,
    WriteResult,
)


class InFlightPolicy:
    """actors.protocols.Policy, and AsyncWriter, of one episode. ``version`` is the one on which it began: its adapters' names stay as they are."""

    def __init__(self, policy: Policy, writer: AsyncWriter) -> None:
        self._policy, self._writer = policy, writer
        self.version: PolicyVersion = policy.version
        self._written_on = policy.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        return await self._policy.generate(prompt_ids, sampling, adapter)

    async def write(self, request: WriteRequest) -> WriteResult:
        self._written_on = self._policy.version
        return await self._writer.write(request)

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        """Without a receipt where a refresh came since the write was asked for: its probe tells what other weights would say."""
        await self._policy.install(key, weights, probe if self._policy.version == self._written_on else None)

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        await self._policy.release(keys)


def dated(trajectory: Trajectory) -> Trajectory:
    """With the version of its oldest token: that is what its staleness counts from."""
    oldest = min(
        (segment.policy_version for segment in trajectory.segments), default=trajectory.policy_version
    )
    return replace(trajectory, policy_version=oldest)
