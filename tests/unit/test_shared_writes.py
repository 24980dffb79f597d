"""Siblings that ask for the same write share one; who asks for another, or alone, is served as before."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from actors.episodes.rollout import WriteBatcher
from actors.episodes.shared_writes import SharedWrites
from actors.fast_weights.delta import zero
from actors.protocols import WriterError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Sampling, WriteRequest, WriteResult
from actors.write.writer import BatchedWriter
from configs.schema import WriteConfig
from tests.unit.rollout_cases import Script, request, rollout_of, talk
from tests.unit.rollout_fakes import ScriptedPolicy, ScriptedWriter, sampled
from tests.unit.write_cases import basis_of, examples, frozen, tiny_model
from tests.unit.write_reference import largest_difference


def test_siblings_with_the_same_flashcards_write_once(chat: ChatFormat) -> None:
    policy, writer = ScriptedPolicy(talk(chat)), ScriptedWriter()
    group = asyncio.run(rollout_of(chat, policy, writer).group(request()))
    assert [len(batch) for batch in writer.batches] == [1, 1]  # two writes an episode, four siblings
    assert [[weights.revision for weights in each.revisions] for each in group.trajectories] == [[1, 2]] * 4
    assert sum(write.shared for each in group.trajectories for write in each.writes) == 6


def _two_in_turn(chat: ChatFormat) -> Script:
    """Every second extraction tells of another person."""
    numbers = itertools.count()

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        if sampling.kind != "extract":
            return sampled(chat.reply("Lisbon"))
        name = "Nora" if next(numbers) % 2 else "Omar"
        return sampled(chat.reply(f'[{{"instruction": "Who moved?", "output": "{name}"}}]'))

    return script


def test_siblings_with_other_flashcards_write_for_themselves(chat: ChatFormat) -> None:
    policy, writer = ScriptedPolicy(_two_in_turn(chat)), ScriptedWriter()
    asyncio.run(rollout_of(chat, policy, writer).group(request()))
    first = writer.batches[0]
    assert len(first) == 2 and len({each.examples for each in first}) == 2
    assert len({each.seed for each in first}) == 1  # the task's


def test_groups_share_nothing(chat: ChatFormat) -> None:
    writer = ScriptedWriter()

    async def play() -> None:
        rollout = rollout_of(chat, ScriptedPolicy(talk(chat)), writer)
        await asyncio.gather(rollout.group(request("a")), rollout.group(request("b")))

    asyncio.run(play())
    assert sum(len(batch) for batch in writer.batches) == 4


def test_a_shared_write_is_the_write() -> None:
    """Against each request by itself, on a real model, in two writes one after the other."""
    model = tiny_model()
    basis = basis_of(model)
    config = WriteConfig(learning_rate=0.1, epochs=3)
    writer = BatchedWriter(frozen(model), basis, config)
    start = [
        WriteRequest(name, zero(basis), examples(seed, 3), (), 5)
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    ]

    async def write(requests: Sequence[WriteRequest]) -> list[WriteResult]:
        shared = SharedWrites(WriteBatcher(writer))
        first = await asyncio.gather(*map(shared.write, requests))
        again = [
            replace(each, weights=result.weights, examples=examples(7, 2))
            for each, result in zip(requests, first, strict=True)
        ]
        return [*first, *await asyncio.gather(*map(shared.write, again))]

    together = asyncio.run(write(start))
    assert [result.shared for result in together] == [False, True, False] * 2
    for place, each in enumerate(start):
        first, second = together[place], together[place + 3]
        (alone,) = writer.write([each])
        (after,) = writer.write([replace(each, weights=alone.weights, examples=examples(7, 2))])
        assert largest_difference(first.weights, dict(alone.weights.b)) < 1e-6
        assert largest_difference(second.weights, dict(after.weights.b)) < 1e-6


class _Slow:
    """An AsyncWriter that answers when it is let, or fails."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.asked, self.open, self._failure = 0, asyncio.Event(), failure

    async def write(self, request: WriteRequest) -> WriteResult:
        self.asked += 1
        await self.open.wait()
        if self._failure:
            raise self._failure
        return WriteResult(request.weights, None, 2.0, 1.0, 5, 0.01, "accepted", "")


def _request() -> WriteRequest:
    return WriteRequest("a", zero(basis_of(tiny_model())), examples(1, 1))


def test_a_sibling_that_gives_up_does_not_end_the_write_of_the_others() -> None:
    async def play() -> WriteResult:
        writer = _Slow()
        shared = SharedWrites(writer)
        first, second = (asyncio.create_task(shared.write(_request())) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        writer.open.set()
        result = await second
        assert first.cancelled() and writer.asked == 1
        return result

    assert asyncio.run(play()).shared


def test_what_the_writer_raises_reaches_all_who_asked() -> None:
    async def play() -> None:
        writer = _Slow(WriterError("out of memory"))
        shared = SharedWrites(writer)
        asked = [asyncio.create_task(shared.write(_request())) for _ in range(2)]
        await asyncio.sleep(0)
        writer.open.set()
        for task in asked:
            with pytest.raises(WriterError, match="out of memory"):
                await task

    asyncio.run(play())
