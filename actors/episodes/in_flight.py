"""An episode that lives through refreshes of its worker (``rollout.refresh: in_flight``).

    ... sample under theta_3 + Delta | refresh to 4 | sample on under theta_4 + Delta ...

The engine changes theta between two of its steps. The reply goes on, and each token carries its version.

Kept: the tokens so far, with the log-probs of the weights that sampled them. So the learner's ratio is right
for each token. Kept too: the adapters, under names with the version on which the episode began.
Computed again: keys and values of running requests, and the prefix cache. So each log-prob is of one theta.
Given up: the paper (TMEM, arXiv 2606.04536) fixes theta within a rollout. Here A, and the B of earlier
writes, were made for older weights than those they are added to.
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
    """Policy and AsyncWriter (actors/protocols.py) of one episode.

    ``version`` stays the version on which the episode began, so the names of its adapters stay too.
    """

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
        """Install without a receipt if a refresh came after the write: its probe is of the older weights."""
        await self._policy.install(key, weights, probe if self._policy.version == self._written_on else None)

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        await self._policy.release(keys)


def dated(trajectory: Trajectory) -> Trajectory:
    """Return ``trajectory`` with the version of its oldest token, from which its staleness counts."""
    versions = [segment.policy_version for segment in trajectory.segments]
    return replace(trajectory, policy_version=min(versions, default=trajectory.policy_version))
