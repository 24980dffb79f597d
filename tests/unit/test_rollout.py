"""Groups of concurrent episodes: slots, batched writes, deadlines, and failures that stay with an episode."""

from __future__ import annotations

import asyncio
import copy
import re
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from actors.environments.recall import RecallEnvironment, RecallSession
from actors.episodes.rollout import RolloutRequest, WriteBatcher
from actors.protocols import EngineError, ReceiptError, TaskError, WriterError
from actors.text.chat_template import ChatFormat
from actors.types import (
    AdapterKey,
    FailedEpisode,
    FastWeights,
    Generation,
    Outcome,
    Probe,
    Sampling,
    Task,
    WriteExample,
    WriteRequest,
    WriteResult,
)
from configs.schema import RolloutConfig
from tests.unit.rollout_cases import (
    RECALL,
    TASK,
    Script,
    group_in,
    request,
    rollout_of,
    talk,
    with_outcome,
)
from tests.unit.rollout_fakes import ScriptedPolicy, ScriptedWriter


def test_a_group(chat: ChatFormat) -> None:
    policy, writer = ScriptedPolicy(talk(chat)), ScriptedWriter()
    group = asyncio.run(rollout_of(chat, policy, writer).group(request()))
    assert [trajectory.episode_id for trajectory in group.trajectories] == ["g.0", "g.1", "g.2", "g.3"]
    assert (group.failed, group.policy_version, group.worker, group.task) == ((), 3, "worker-0", TASK)
    assert all(len(trajectory.revisions) == 2 for trajectory in group.trajectories)
    assert [len(batch) for batch in writer.batches] == [1, 1]  # siblings write the same, and once
    assert policy.installed == {}
    copied = copy.deepcopy(group)  # goes through the pickling protocol, as on the way to the learner
    ids, copied_ids = (each.trajectories[0].segments[0].token_ids.tolist() for each in (group, copied))
    assert ids == copied_ids


def test_siblings_sample_with_seeds_of_their_own_that_the_group_id_does_not_change(chat: ChatFormat) -> None:
    def seeds(request: RolloutRequest) -> set[int]:
        policy = ScriptedPolicy(talk(chat))
        asyncio.run(rollout_of(chat, policy, ScriptedWriter()).group(request))
        return {sampling.seed for _, sampling, _ in policy.calls}

    first = seeds(request())
    assert len(first) == 16  # 4 siblings of 4 events
    assert seeds(request(group_id="again")) == first
    assert not seeds(request(seed=2)) & first


@pytest.mark.parametrize("slots", [1, 3])
def test_slots_bound_the_episodes_of_all_groups(chat: ChatFormat, slots: int) -> None:
    policy = ScriptedPolicy(talk(chat), delay_s=0.002)

    async def play() -> None:
        rollout = rollout_of(chat, policy, ScriptedWriter(), slots=slots)
        groups = await asyncio.gather(*(rollout.group(request(f"g{i}")) for i in range(3)))
        assert sum(len(group.trajectories) for group in groups) == 12

    asyncio.run(play())
    assert policy.most_running == slots


def _failing(error: Exception, sibling: int, chat: ChatFormat) -> Script:
    usual, seen = talk(chat), iter(range(100))

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        if next(seen) == sibling:
            raise error
        return usual(prompt_ids, sampling, adapter)

    return script


def test_an_engine_error_fails_one_episode(chat: ChatFormat) -> None:
    policy = ScriptedPolicy(_failing(EngineError("the prompt has\n 9000 tokens"), 2, chat))
    group = asyncio.run(rollout_of(chat, policy, ScriptedWriter()).group(request()))
    assert group.failed == (FailedEpisode(TASK.id, "g.2", "engine", "the prompt has 9000 tokens"),)
    assert len(group.trajectories) == 3


def test_a_failed_receipt_is_its_own_boundary(chat: ChatFormat) -> None:
    class Doubter(ScriptedPolicy):
        async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
            await super().install(key, weights, probe)
            if key.name == "v3/g.1@2":
                raise ReceiptError("the adapter does not act")

    policy = Doubter(talk(chat))
    group = asyncio.run(rollout_of(chat, policy, ScriptedWriter()).group(request()))
    assert [(failed.episode_id, failed.boundary) for failed in group.failed] == [("g.1", "receipt")]
    assert policy.installed == {}


def test_a_writer_error_fails_just_the_episodes_of_its_batch(chat: ChatFormat) -> None:
    class Flaky(ScriptedWriter):
        def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
            if any(request.episode_id.startswith("bad") for request in requests):
                raise WriterError("out of memory")
            return super().write(requests)

    async def play() -> None:
        rollout = rollout_of(chat, ScriptedPolicy(talk(chat)), Flaky(), slots=4)
        bad = await rollout.group(request("bad"))
        good = await rollout.group(request("good"))
        assert [(failed.boundary, failed.message) for failed in bad.failed] == [
            ("writer", "out of memory")
        ] * 4
        assert len(good.trajectories) == 4

    asyncio.run(play())


def test_an_environment_error_fails_one_episode(chat: ChatFormat) -> None:
    class Trap(RecallEnvironment):
        def start(self, task: Task) -> RecallSession:
            if next(starts) == 0:
                raise TaskError("task t: field x is missing")
            return super().start(task)

    starts = iter(range(9))
    group = group_in(chat, Trap(RECALL))
    (failed,) = group.failed
    assert failed.boundary == "environment"
    assert re.fullmatch(r"task t: field x is missing \(tests/unit/test_rollout\.py:\d+\)", failed.message)


def test_a_late_episode_is_a_timeout_and_its_slot_is_free_again(chat: ChatFormat) -> None:
    async def play() -> None:
        policy = ScriptedPolicy(talk(chat), delay_s=60)
        rollout = rollout_of(chat, policy, ScriptedWriter(), slots=2, timeout_s=0.05)
        started = time.monotonic()
        group = await rollout.group(request())
        assert [failed.boundary for failed in group.failed] == ["timeout"] * 4
        assert "rollout.episode_timeout_s=0.05" in group.failed[0].message
        assert time.monotonic() - started < 5 and policy.running == 0
        policy._delay_s = 0
        rollout._rollout = RolloutConfig()
        assert len((await rollout.group(request("again"))).trajectories) == 4

    asyncio.run(play())


def _scored_by(judge: Callable[[], None]) -> RecallEnvironment:
    """The recall environment, with a judge who is asked before each outcome."""

    def judged(outcome: Outcome) -> Outcome:
        judge()
        return outcome

    return with_outcome(judged)


def test_a_verdict_counts_against_no_episode_and_holds_no_slot(chat: ChatFormat) -> None:
    together = threading.Barrier(4, timeout=10)  # passed when all four are being judged

    def judge() -> None:
        together.wait()
        time.sleep(1.2)  # over the episode's deadline

    group = group_in(chat, _scored_by(judge), slots=1, timeout_s=1)
    assert group.failed == () and len(group.trajectories) == 4
    assert all(trajectory.timings.environment > 1.2 for trajectory in group.trajectories)


def test_a_verdict_that_does_not_come_is_not_the_engines_fault(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.episodes.rollout.SCORING_S", 0.05)
    given_up = threading.Event()
    policy = ScriptedPolicy(talk(chat))
    court = _scored_by(lambda: _wait(given_up))
    group = asyncio.run(rollout_of(chat, policy, ScriptedWriter(), environment=court).group(request()))
    given_up.set()
    assert group.trajectories == () and policy.installed == {}
    assert {failed.boundary for failed in group.failed} == {"timeout"}
    waited = "played, but not scored after 0.05 s: waiting for the environment recall and its judge"
    assert group.failed[0].message.startswith(waited)


def test_a_wait_that_gives_up_is_reported_at_its_boundary(chat: ChatFormat) -> None:
    def gone() -> None:
        raise TimeoutError("no answer from the court")

    group = group_in(chat, _scored_by(gone))
    owner = f"task {TASK.id}: the environment recall's outcome: TimeoutError: no answer from the court"
    assert {failed.boundary for failed in group.failed} == {"environment"}
    assert group.failed[0].message.startswith(f"{owner} (tests/unit/test_rollout.py:")
    policy = ScriptedPolicy(_failing(TimeoutError("no reply"), 0, chat))
    group = asyncio.run(rollout_of(chat, policy, ScriptedWriter()).group(request()))
    assert [(failed.boundary, failed.message) for failed in group.failed] == [
        ("engine", "a wait inside the episode timed out: no reply")
    ]


def _wait(event: threading.Event) -> None:
    assert event.wait(10), "the test forgot to end the verdict"


def test_a_programming_error_ends_the_group_and_its_siblings(chat: ChatFormat) -> None:
    policy = ScriptedPolicy(_failing(KeyError("typo"), 1, chat), delay_s=0.01)
    with pytest.raises(KeyError, match="typo"):
        asyncio.run(rollout_of(chat, policy, ScriptedWriter()).group(request()))
    assert policy.running == 0 and policy.installed == {}


def test_cancelling_the_group_cancels_its_episodes(chat: ChatFormat) -> None:
    async def play() -> None:
        policy = ScriptedPolicy(talk(chat), delay_s=60)
        running = asyncio.create_task(rollout_of(chat, policy, ScriptedWriter()).group(request()))
        await asyncio.sleep(0.05)
        assert policy.running == 4
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert policy.running == 0

    asyncio.run(play())


def _write_of(episode_id: str) -> WriteRequest:
    return WriteRequest(episode_id, FastWeights("basis", 0, {}), (WriteExample((1,), (2,)),))


def test_what_comes_in_during_a_write_is_the_next_batch() -> None:
    async def play() -> None:
        writer = ScriptedWriter()
        batcher = WriteBatcher(writer)
        requests = [_write_of(f"e{number}") for number in range(6)]
        writer.gate.clear()
        first = asyncio.create_task(batcher.write(requests[0]))
        await asyncio.sleep(0.02)
        later = [asyncio.create_task(batcher.write(request)) for request in requests[1:]]
        await asyncio.sleep(0.02)
        later[0].cancel()  # gives up before its batch starts
        writer.gate.set()
        results = await asyncio.gather(first, *later[1:])
        batches = [[request.episode_id for request in batch] for batch in writer.batches]
        assert batches == [["e0"], ["e2", "e3", "e4", "e5"]]
        assert all(result.weights.revision == 1 for result in results)
        # and it starts again after being idle
        assert (await batcher.write(requests[1])).outcome == "accepted"

    asyncio.run(play())


def test_giving_up_during_a_write_does_not_disturb_the_batch() -> None:
    async def play() -> None:
        writer = ScriptedWriter()
        batcher = WriteBatcher(writer)
        writer.gate.clear()
        tasks = [asyncio.create_task(batcher.write(_write_of(f"e{number}"))) for number in range(2)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        writer.gate.set()
        assert (await tasks[1]).outcome == "accepted"

    asyncio.run(play())


def test_a_writer_that_miscounts_is_an_error() -> None:
    class Short(ScriptedWriter):
        def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
            return super().write(requests)[1:]

    async def play() -> None:
        with pytest.raises(WriterError, match="0 results for 1 requests"):
            await WriteBatcher(Short()).write(_write_of("e"))

    asyncio.run(play())


def test_bad_requests_are_refused(chat: ChatFormat) -> None:
    with pytest.raises(ValueError, match="group_size=0"):
        request(group_size=0)
    with pytest.raises(ValueError, match="slots=0"):
        rollout_of(chat, ScriptedPolicy(talk(chat)), ScriptedWriter(), slots=0)
