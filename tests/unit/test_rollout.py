"""Groups of concurrent episodes: slots, batched writes, deadlines, and failures that stay with an episode."""

from __future__ import annotations

import asyncio
import copy
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.environments.recall import RecallEnvironment, RecallSession
from actors.episodes.rollout import Rollout, RolloutRequest, WriteBatcher
from actors.protocols import EngineError, FastWeightWriter, ReceiptError, TaskError, WriterError
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
    TrajectoryGroup,
    WriteExample,
    WriteRequest,
    WriteResult,
)
from configs.schema import MemoryConfig, RecallConfig, RolloutConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

CARDS = '[{"instruction": "Who moved?", "output": "Nora"}]'
RECALL = RecallConfig(sessions=2, facts_per_session=4, questions=2, filler_sentences=1)
ENVIRONMENT = RecallEnvironment(RECALL)
TASK = next(ENVIRONMENT.tasks("train", 0, 0))
MEMORY = MemoryConfig(max_context_tokens=50)
Script = Callable[[Sequence[int], Sampling, AdapterKey], Generation]


def _talk(chat: ChatFormat) -> Script:
    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply(CARDS if sampling.kind == "extract" else "Lisbon"))

    return script


def _rollout(
    chat: ChatFormat,
    policy: ScriptedPolicy,
    writer: FastWeightWriter,
    slots: int = 8,
    timeout_s: float = 30,
    environment: RecallEnvironment = ENVIRONMENT,
) -> Rollout:
    config = RolloutConfig(episode_timeout_s=timeout_s)
    return Rollout(
        policy, writer, environment, chat, WriteConfig(), config, slots, SURROUNDINGS, "basis", "worker-0"
    )


def _request(group_id: str = "g", group_size: int = 4, seed: int = 1) -> RolloutRequest:
    return RolloutRequest(TASK, group_id, group_size, MEMORY, temperature=1.0, max_answer_tokens=8, seed=seed)


def _group_in(
    chat: ChatFormat, environment: RecallEnvironment, slots: int = 8, timeout_s: float = 30
) -> TrajectoryGroup:
    """Play one group in ``environment``."""
    policy, writer = ScriptedPolicy(_talk(chat)), ScriptedWriter()
    return asyncio.run(_rollout(chat, policy, writer, slots, timeout_s, environment).group(_request()))


def test_a_group(chat: ChatFormat) -> None:
    policy, writer = ScriptedPolicy(_talk(chat)), ScriptedWriter()
    group = asyncio.run(_rollout(chat, policy, writer).group(_request()))
    assert [trajectory.episode_id for trajectory in group.trajectories] == ["g.0", "g.1", "g.2", "g.3"]
    assert (group.failed, group.policy_version, group.worker, group.task) == ((), 3, "worker-0", TASK)
    assert all(len(trajectory.revisions) == 2 for trajectory in group.trajectories)
    assert [len(batch) for batch in writer.batches] == [4, 4]  # siblings write together
    assert policy.installed == {}
    copied = copy.deepcopy(group)  # goes through the pickling protocol, as on the way to the learner
    ids, copied_ids = (each.trajectories[0].segments[0].token_ids.tolist() for each in (group, copied))
    assert ids == copied_ids


def test_siblings_sample_with_seeds_of_their_own_that_the_group_id_does_not_change(chat: ChatFormat) -> None:
    def seeds(request: RolloutRequest) -> set[int]:
        policy = ScriptedPolicy(_talk(chat))
        asyncio.run(_rollout(chat, policy, ScriptedWriter()).group(request))
        return {sampling.seed for _, sampling, _ in policy.calls}

    first = seeds(_request())
    assert len(first) == 16  # 4 siblings of 4 events
    assert seeds(_request(group_id="again")) == first
    assert not seeds(_request(seed=2)) & first


@pytest.mark.parametrize("slots", [1, 3])
def test_slots_bound_the_episodes_of_all_groups(chat: ChatFormat, slots: int) -> None:
    policy = ScriptedPolicy(_talk(chat), delay_s=0.002)

    async def play() -> None:
        rollout = _rollout(chat, policy, ScriptedWriter(), slots=slots)
        groups = await asyncio.gather(*(rollout.group(_request(f"g{i}")) for i in range(3)))
        assert sum(len(group.trajectories) for group in groups) == 12

    asyncio.run(play())
    assert policy.most_running == slots


def _failing(error: Exception, sibling: int, chat: ChatFormat) -> Script:
    talk, seen = _talk(chat), iter(range(100))

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        if next(seen) == sibling:
            raise error
        return talk(prompt_ids, sampling, adapter)

    return script


def test_an_engine_error_fails_one_episode(chat: ChatFormat) -> None:
    policy = ScriptedPolicy(_failing(EngineError("the prompt has\n 9000 tokens"), 2, chat))
    group = asyncio.run(_rollout(chat, policy, ScriptedWriter()).group(_request()))
    assert group.failed == (FailedEpisode(TASK.id, "g.2", "engine", "the prompt has 9000 tokens"),)
    assert len(group.trajectories) == 3


def test_a_failed_receipt_is_its_own_boundary(chat: ChatFormat) -> None:
    class Doubter(ScriptedPolicy):
        async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
            await super().install(key, weights, probe)
            if key.name == "v3/g.1@2":
                raise ReceiptError("the adapter does not act")

    policy = Doubter(_talk(chat))
    group = asyncio.run(_rollout(chat, policy, ScriptedWriter()).group(_request()))
    assert [(failed.episode_id, failed.boundary) for failed in group.failed] == [("g.1", "receipt")]
    assert policy.installed == {}


def test_a_writer_error_fails_just_the_episodes_of_its_batch(chat: ChatFormat) -> None:
    class Flaky(ScriptedWriter):
        def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
            if any(request.episode_id.startswith("bad") for request in requests):
                raise WriterError("out of memory")
            return super().write(requests)

    async def play() -> None:
        rollout = _rollout(chat, ScriptedPolicy(_talk(chat)), Flaky(), slots=4)
        bad = await rollout.group(_request("bad"))
        good = await rollout.group(_request("good"))
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
    group = _group_in(chat, Trap(RECALL))
    (failed,) = group.failed
    assert failed.boundary == "environment"
    assert re.fullmatch(r"task t: field x is missing \(tests/unit/test_rollout\.py:\d+\)", failed.message)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outcome: replace(outcome, reward=float("nan")), "the reward nan"),
        (lambda outcome: replace(outcome, reward=-np.inf), "the reward -inf"),
        (lambda outcome: replace(outcome, reward_parts={"f1": np.float32("nan")}), "the reward part f1 nan"),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], scores={"em": np.inf}),)),
            "the score em inf",
        ),
    ],
)
def test_a_number_that_is_not_finite_fails_its_own_episode(
    chat: ChatFormat, change: Callable[[Outcome], Outcome], said: str
) -> None:
    class Broken(RecallSession):
        def outcome(self) -> Outcome:
            return change(super().outcome())

    class Trap(RecallEnvironment):
        def start(self, task: Task) -> RecallSession:
            return Broken(task) if next(starts) == 0 else super().start(task)

    starts = iter(range(9))
    group = _group_in(chat, Trap(RECALL))
    message = f"task {TASK.id}: the environment recall gave {said}, it must be a finite number"
    assert [(failed.boundary, failed.message) for failed in group.failed] == [("environment", message)]
    assert len(group.trajectories) == _request().group_size - 1


def _with_outcome(change: Callable[[Outcome], Outcome]) -> RecallEnvironment:
    """The recall environment, with ``change`` done to each outcome."""

    class Changed(RecallSession):
        def outcome(self) -> Outcome:
            return change(super().outcome())

    class Changing(RecallEnvironment):
        def start(self, task: Task) -> RecallSession:
            return Changed(task)

    return Changing(RECALL)


def test_scores_in_numpys_numbers_are_kept_like_pythons_own(chat: ChatFormat) -> None:
    def in_numpy(outcome: Outcome) -> Outcome:
        scores = {"f1": np.float32(0.5), "em": np.bool_(False)}
        answers = tuple(replace(answer, scores=scores) for answer in outcome.answers)
        parts = {"f1": np.float32(0.5), "hits": np.int64(3)}
        return Outcome(np.float32(0.25), parts, answers)  # type: ignore[arg-type]

    outcome = _group_in(chat, _with_outcome(in_numpy)).trajectories[0].outcome
    scores = [score for answer in outcome.answers for score in answer.scores.values()]
    assert {type(value) for value in (outcome.reward, *outcome.reward_parts.values(), *scores)} == {float}
    assert (outcome.reward, outcome.reward_parts) == (0.25, {"f1": 0.5, "hits": 3.0})
    assert outcome.answers[0].scores == {"f1": 0.5, "em": 0.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outcome: replace(outcome, reward="high"), "the reward as str"),
        (lambda outcome: replace(outcome, reward=10**400), "the reward as int"),
        (lambda outcome: replace(outcome, reward=torch.zeros(2)), "the reward as Tensor"),
        (
            lambda outcome: replace(outcome, reward_parts={"f1": np.zeros(2000)}),
            "the reward part f1 as ndarray",
        ),
        (lambda outcome: replace(outcome, reward_parts={"f1": None}), "the reward part f1 as NoneType"),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], scores={"em": "yes"}),)),
            "the score em as str",
        ),
    ],
)
def test_a_score_that_is_no_number_is_named(
    chat: ChatFormat, change: Callable[[Outcome], Outcome], said: str
) -> None:
    group = _group_in(chat, _with_outcome(change))
    message = f"task {TASK.id}: the environment recall gave {said}, it must be one number"
    assert {(failed.boundary, failed.message) for failed in group.failed} == {("environment", message)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda outcome: replace(outcome, reward_parts=None),
            "the reward parts as NoneType, it must be a mapping of names to numbers",
        ),
        (lambda outcome: replace(outcome, answers=None), "answers as NoneType, it must be a tuple of Answer"),
        (lambda outcome: replace(outcome, answers=({},)), "an answer as dict, it must be an Answer"),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], gold=7),)),
            "gold as int, it must be a tuple of texts",
        ),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], scores=[1.0]),)),
            "the scores as list, it must be a mapping of names to numbers",
        ),
    ],
)
def test_an_outcome_of_another_shape_is_said_in_the_users_words(
    chat: ChatFormat, change: Callable[[Outcome], Outcome], said: str
) -> None:
    group = _group_in(chat, _with_outcome(change))
    message = f"task {TASK.id}: the environment recall gave {said}"
    assert {failed.message.partition(" (")[0] for failed in group.failed} == {message}


@pytest.mark.parametrize("listed", [list, set, np.array, iter])
def test_answers_and_gold_may_be_any_collection(
    chat: ChatFormat, listed: Callable[[Sequence[str]], Any]
) -> None:
    def change(outcome: Outcome) -> Outcome:
        answers = (replace(answer, gold=listed(["Oslo"])) for answer in outcome.answers)
        return replace(outcome, answers=answers)  # type: ignore[arg-type]

    group = _group_in(chat, _with_outcome(change))
    assert not group.failed
    assert {answer.gold for one in group.trajectories for answer in one.outcome.answers} == {("Oslo",)}


def test_a_number_as_a_gold_answer_is_named(chat: ChatFormat) -> None:
    group = _group_in(
        chat,
        _with_outcome(lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], gold=(3,)),))),
    )
    assert "outcome gave int as a gold answer, it must be a text" in group.failed[0].message


def test_a_late_episode_is_a_timeout_and_its_slot_is_free_again(chat: ChatFormat) -> None:
    async def play() -> None:
        policy = ScriptedPolicy(_talk(chat), delay_s=60)
        rollout = _rollout(chat, policy, ScriptedWriter(), slots=2, timeout_s=0.05)
        started = time.monotonic()
        group = await rollout.group(_request())
        assert [failed.boundary for failed in group.failed] == ["timeout"] * 4
        assert "rollout.episode_timeout_s=0.05" in group.failed[0].message
        assert time.monotonic() - started < 5 and policy.running == 0
        policy._delay_s = 0
        rollout._rollout = RolloutConfig()
        assert len((await rollout.group(_request("again"))).trajectories) == 4

    asyncio.run(play())


def _scored_by(judge: Callable[[], None]) -> RecallEnvironment:
    """The recall environment, with a judge who is asked before each outcome."""

    def judged(outcome: Outcome) -> Outcome:
        judge()
        return outcome

    return _with_outcome(judged)


def test_a_verdict_counts_against_no_episode_and_holds_no_slot(chat: ChatFormat) -> None:
    together = threading.Barrier(4, timeout=10)  # passed when all four are being judged

    def judge() -> None:
        together.wait()
        time.sleep(1.2)  # over the episode's deadline

    group = _group_in(chat, _scored_by(judge), slots=1, timeout_s=1)
    assert group.failed == () and len(group.trajectories) == 4
    assert all(trajectory.timings.environment > 1.2 for trajectory in group.trajectories)


def test_a_verdict_that_does_not_come_is_not_the_engines_fault(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.episodes.rollout.SCORING_S", 0.05)
    given_up = threading.Event()
    policy = ScriptedPolicy(_talk(chat))
    court = _scored_by(lambda: _wait(given_up))
    group = asyncio.run(_rollout(chat, policy, ScriptedWriter(), environment=court).group(_request()))
    given_up.set()
    assert group.trajectories == () and policy.installed == {}
    assert {failed.boundary for failed in group.failed} == {"timeout"}
    waited = "played, but not scored after 0.05 s: waiting for the environment recall and its judge"
    assert group.failed[0].message.startswith(waited)


def test_a_wait_that_gives_up_is_reported_at_its_boundary(chat: ChatFormat) -> None:
    def gone() -> None:
        raise TimeoutError("no answer from the court")

    group = _group_in(chat, _scored_by(gone))
    owner = f"task {TASK.id}: the environment recall's outcome: TimeoutError: no answer from the court"
    assert {failed.boundary for failed in group.failed} == {"environment"}
    assert group.failed[0].message.startswith(f"{owner} (tests/unit/test_rollout.py:")
    policy = ScriptedPolicy(_failing(TimeoutError("no reply"), 0, chat))
    group = asyncio.run(_rollout(chat, policy, ScriptedWriter()).group(_request()))
    assert [(failed.boundary, failed.message) for failed in group.failed] == [
        ("engine", "a wait inside the episode timed out: no reply")
    ]


def _wait(event: threading.Event) -> None:
    assert event.wait(10), "the test forgot to end the verdict"


def test_a_programming_error_ends_the_group_and_its_siblings(chat: ChatFormat) -> None:
    policy = ScriptedPolicy(_failing(KeyError("typo"), 1, chat), delay_s=0.01)
    with pytest.raises(KeyError, match="typo"):
        asyncio.run(_rollout(chat, policy, ScriptedWriter()).group(_request()))
    assert policy.running == 0 and policy.installed == {}


def test_cancelling_the_group_cancels_its_episodes(chat: ChatFormat) -> None:
    async def play() -> None:
        policy = ScriptedPolicy(_talk(chat), delay_s=60)
        running = asyncio.create_task(_rollout(chat, policy, ScriptedWriter()).group(_request()))
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
        _request(group_size=0)
    with pytest.raises(ValueError, match="slots=0"):
        _rollout(chat, ScriptedPolicy(_talk(chat)), ScriptedWriter(), slots=0)
