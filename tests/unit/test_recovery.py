"""An episode whose worker died is continued from its progress, the same to the token.

Nothing of its past is sampled or installed again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.environments.base import Observation
from actors.environments.recall import RecallEnvironment, RecallSession
from actors.episodes.recovery import Event, Progress, Recovered, Recovery, Sampled, Written
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.protocols import EngineError
from actors.text.chat_template import ChatFormat
from actors.types import (
    AdapterKey,
    Generation,
    PolicyVersion,
    Sampling,
    Task,
    Trajectory,
    WriteRequest,
    WriteResult,
)
from cluster.fleet.episode_journal import GroupJournal
from cluster.fleet.ledger import Ledger, LedgerSnapshot, ledger_line
from configs.schema import MemoryConfig, MemoryPolicy, RecallConfig, RolloutConfig, WriteConfig
from tests.unit.rollout_fakes import MODULE, SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

RECALL = RecallConfig(sessions=4, facts_per_session=4, questions=2, filler_sentences=1)
ENVIRONMENT = RecallEnvironment(RECALL)
TASK = next(ENVIRONMENT.tasks("train", 0, 0))
REQUEST = RolloutRequest(
    TASK, "g", 1, MemoryConfig(max_context_tokens=50, max_extract_tokens=64), 1.0, 8, seed=1
)
WRITE = WriteConfig()
NAMES = ("Nora", "Ivan", "Mei", "Omar", "Lena")


class Worker:
    """A rollout whose engine samples what prompt, seed and adapter determine.

    It dies when asked for reply number ``dies_at``, counted from 0.
    """

    def __init__(
        self,
        chat: ChatFormat,
        journal: GroupJournal,
        dies_at: int = 10**6,
        environment: RecallEnvironment = ENVIRONMENT,
        write: WriteConfig = WRITE,
    ) -> None:
        self.policy = ScriptedPolicy(self._talk)
        self.writer = ScriptedWriter(self._outcome)
        self.journal = journal
        self._chat, self._dies_at = chat, dies_at
        config = RolloutConfig(episode_timeout_s=30)
        self._rollout = Rollout(
            self.policy, self.writer, environment, chat, write, config, 8, SURROUNDINGS, "basis", "worker-0"
        )

    def play(self, reissued: bool = False, request: RolloutRequest = REQUEST) -> tuple[Trajectory, Recovered]:
        recovery = Recovery(self.journal, reissued, self.journal.progress("g"))
        group, recovered = asyncio.run(self._rollout.recoverable_group(request, recovery))
        if group.failed:
            raise EngineError(group.failed[0].message)
        return group.trajectories[0], recovered

    def _talk(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        if len(self.policy.calls) > self._dies_at:
            raise EngineError("killed")
        drawn = hashlib.sha256(repr((list(prompt_ids), sampling.seed, adapter.revision)).encode()).digest()
        who, what = NAMES[drawn[0] % 5], NAMES[drawn[1] % 5]
        card = f'[{{"instruction": "Who met {who}?", "output": "{what}"}}]'
        return sampled(self._chat.reply(card if sampling.kind == "extract" else what))

    def _outcome(self, request: WriteRequest) -> str:
        return "rolled_back" if request.weights.revision == 1 and len(request.examples) % 2 else "accepted"


def content(trajectory: Trajectory) -> tuple[object, ...]:
    """All of a trajectory but its timings, in values that can be compared."""
    segments = [
        (part.token_ids.tolist(), part.logprobs.tolist(), part.revision, part.spans, part.policy_version)
        for part in trajectory.segments
    ]
    revisions = [(weights.revision, weights.b[MODULE].tolist()) for weights in trajectory.revisions]
    return segments, revisions, trajectory.writes, trajectory.outcome, trajectory.memory_events


@pytest.mark.parametrize("policy", ["parametric", "hybrid"])
def test_an_episode_cut_at_each_reply_and_continued_elsewhere_is_the_uncut_one_to_the_token(
    chat: ChatFormat, policy: MemoryPolicy
) -> None:
    request = replace(REQUEST, memory=replace(REQUEST.memory, policy=policy, max_summary_tokens=32))
    whole = Worker(chat, GroupJournal(10**6))
    uncut, recovered = whole.play(request=request)
    replies = len(whole.policy.calls)
    assert recovered == Recovered(0, 0) and replies >= 4
    known_replies = []
    for cut in range(replies):
        journal = GroupJournal(10**6)
        with pytest.raises(EngineError, match="killed"):
            Worker(chat, journal, dies_at=cut).play(request=request)
        known = sum(
            isinstance(event, Sampled)
            for progress in journal.progress("g").values()
            for event in progress.events
        )
        other = Worker(chat, journal)
        trajectory, recovered = other.play(reissued=True, request=request)
        assert content(trajectory) == content(uncut)
        assert recovered == (Recovered(1, 0) if known else Recovered(0, 1))
        assert len(other.policy.calls) == replies - known <= replies
        assert len(other.policy.released) <= len(uncut.revisions) and other.policy.installed == {}
        known_replies.append(known)
    assert known_replies == sorted(known_replies) and known_replies[-1] > known_replies[0] == 0


def test_only_the_last_revision_of_the_past_is_installed_and_rejected_writes_are_not_computed_again(
    chat: ChatFormat,
) -> None:
    whole, journal = Worker(chat, GroupJournal(10**6)), GroupJournal(10**6)
    uncut, _ = whole.play()
    with pytest.raises(EngineError):
        Worker(chat, journal, dies_at=len(whole.policy.calls) - 1).play()
    written = [event for event in journal.progress("g")[0].events if isinstance(event, Written)]
    assert len(written) >= 3
    other = Worker(chat, journal)
    other.play(reissued=True)
    assert len(other.writer.batches) == sum(event.outcome == "accepted" for event in written)
    assert other.policy.released == [f"v3/g.0@{len(uncut.revisions)}"]
    assert [probe is None for probe in other.policy.probes] == [False]  # it is proved by a receipt


def test_an_episode_whose_worker_died_while_it_was_scored_samples_nothing_again(chat: ChatFormat) -> None:
    journal = GroupJournal(10**6)
    played, _ = Worker(chat, journal).play()  # the journal keeps the progress until the group has arrived
    other = Worker(chat, journal)
    trajectory, recovered = other.play(reissued=True)
    assert content(trajectory) == content(played) and recovered == Recovered(1, 0)
    assert other.policy.calls == [] and other.policy.probes == []


def test_another_policy_version_starts_anew_and_its_progress_replaces_the_old(chat: ChatFormat) -> None:
    journal = GroupJournal(10**6)
    with pytest.raises(EngineError):
        Worker(chat, journal, dies_at=2).play()
    assert journal.progress("g")[0].version == 3
    other = Worker(chat, journal)
    other.policy.version = 4
    trajectory, recovered = other.play(reissued=True)
    assert (trajectory.policy_version, recovered) == (4, Recovered(0, 1))
    assert journal.progress("g")[0].version == 4


def cut_journal(chat: ChatFormat, environment: RecallEnvironment = ENVIRONMENT) -> GroupJournal:
    """The journal of an episode whose worker died when asked for its third reply."""
    journal = GroupJournal(10**6)
    with pytest.raises(EngineError):
        Worker(chat, journal, dies_at=2, environment=environment).play()
    return journal


def test_an_episode_of_a_session_with_state_of_its_own_starts_anew(chat: ChatFormat) -> None:
    class Moody(RecallEnvironment):
        def start(self, task: Task) -> RecallSession:
            return _Shuffled(task, next(moods))

    class _Shuffled(RecallSession):
        def __init__(self, task: Task, mood: int) -> None:
            super().__init__(task)
            self._mood = mood

        def observe(self) -> Observation | None:
            seen = super().observe()
            return None if seen is None else replace(seen, text=f"{seen.text} It was day {self._mood}.")

    moods = iter(range(9))
    journal = cut_journal(chat, Moody(RECALL))
    assert Worker(chat, journal, environment=Moody(RECALL)).play(reissued=True)[1] == Recovered(0, 1)


@pytest.mark.parametrize(("difference", "recovered"), [(0.005, Recovered(1, 0)), (0.02, Recovered(0, 1))])
def test_an_episode_whose_write_has_another_loss_starts_anew(
    chat: ChatFormat, difference: float, recovered: Recovered
) -> None:
    class OtherBase(ScriptedWriter):
        def _result(self, request: WriteRequest) -> WriteResult:
            return replace(super()._result(request), loss_before=2.0 + difference)

    other = Worker(chat, cut_journal(chat))
    other.writer.__class__ = OtherBase
    assert other.play(reissued=True)[1] == recovered


def test_an_episode_whose_write_has_other_examples_starts_anew(chat: ChatFormat) -> None:
    journal = cut_journal(chat)
    assert sum(isinstance(event, Written) for event in journal.progress("g")[0].events) == 2
    rehearsing = Worker(chat, journal, write=WriteConfig(rehearsal=1))
    assert rehearsing.play(reissued=True)[1] == Recovered(0, 1)


def _events(count: int) -> tuple[Event, ...]:
    return tuple(Written(bytes([number]), "accepted", 2.0, 1.0, 5, 0.1, "") for number in range(count))


def test_the_journal_is_bounded_and_refuses_a_gap() -> None:
    def note(group: str, start: int, events: tuple[Event, ...], version: PolicyVersion = 3) -> None:
        journal.note(group, 0, version, start, events)

    def count(group: str) -> int:
        return len(journal.progress(group).get(0, Progress(0, ())).events)

    journal = GroupJournal(most_tokens=100)
    note("a", 0, _events(2))
    note("a", 2, _events(1))
    assert count("a") == 3
    note("a", 1, _events(1))  # replaces a late note of the dead worker
    assert count("a") == 2
    note("a", 4, _events(1))
    assert count("a") == 0
    note("a", 0, _events(2))
    note("a", 2, _events(1), version=4)
    assert count("a") == 0
    reply = Sampled(b"", np.zeros(40, np.int32), np.zeros(40, np.float32), "stop")
    for group in ("a", "b", "c"):
        note(group, 0, (reply,))
    assert (count("a"), count("b"), count("c"), journal.tokens) == (0, 1, 1, 80)
    journal.forget("b")
    assert journal.tokens == 40


def test_the_ledger_tells_the_recovered_from_the_restarted() -> None:
    ledger = Ledger(LedgerSnapshot(recovered={"continued": 2, "restarted": 0}))
    assert "(2 episodes recovered, 0 restarted)" in ledger_line(ledger)
    ledger.count_recovered(1, 3)
    assert ledger.snapshot().recovered == {"continued": 3, "restarted": 3}
    assert "recovered" not in ledger_line(Ledger(LedgerSnapshot()))
