"""The episode loop with a scripted engine and writer: what is observed, sampled, written and cleared.

In which order, and under which revision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.environments.base import Observation, Session
from actors.environments.recall import RecallEnvironment
from actors.episodes.episode import EpisodeSpec, derived_seed
from actors.episodes.rollout import WriteBatcher
from actors.memory.build import build_memory
from actors.protocols import EngineError, ReceiptError, TaskError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, FastWeights, Generation, Outcome, Probe, Sampling, Task, Trajectory
from configs.schema import MemoryConfig, RecallConfig, WriteConfig
from tests.unit.rollout_fakes import (
    MODULE,
    SURROUNDINGS,
    ScriptedPolicy,
    ScriptedWriter,
    run_episode,
    sampled,
)

CARDS = '[{"instruction": "Who moved?", "output": "Nora"}]'
# system prompt 18 tokens, session about 45, question about 12
EACH_SESSION = MemoryConfig(max_context_tokens=50)
ENVIRONMENT = RecallEnvironment(
    RecallConfig(sessions=2, facts_per_session=4, questions=2, filler_sentences=1)
)
TASK = next(ENVIRONMENT.tasks("train", 0, 0))


def _spec(**changes: object) -> EpisodeSpec:
    values: dict[str, object] = {
        "task": TASK,
        "episode_id": "g.0",
        "temperature": 1.0,
        "max_answer_tokens": 8,
        "max_turns": 9,
        "seed": 5,
    }
    return EpisodeSpec(**{**values, **changes})  # type: ignore[arg-type]


def _talker(chat: ChatFormat, extraction: str = CARDS, answer: str = "Lisbon") -> ScriptedPolicy:
    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply(extraction if sampling.max_tokens > 8 else answer))

    return ScriptedPolicy(script)


def _run(
    chat: ChatFormat,
    policy: ScriptedPolicy,
    writer: ScriptedWriter,
    memory: MemoryConfig = EACH_SESSION,
    **changes: object,
) -> Trajectory:
    async def play() -> Trajectory:
        built = build_memory(memory, WriteConfig(), SURROUNDINGS)
        batcher = WriteBatcher(writer)
        return await run_episode(_spec(**changes), ENVIRONMENT, policy, batcher, chat, built, "basis")

    return asyncio.run(play())


def test_a_whole_episode(chat: ChatFormat) -> None:
    policy, writer = _talker(chat), ScriptedWriter()
    trajectory = _run(chat, policy, writer)
    kinds = [[span.kind for span in segment.spans] for segment in trajectory.segments]
    assert kinds == [["extract"], ["extract"], ["act", "act"]]
    assert [segment.revision for segment in trajectory.segments] == [0, 1, 2]
    assert [weights.revision for weights in trajectory.revisions] == [1, 2]
    assert [record.revision for record in trajectory.writes] == [1, 2]
    assert [segment.policy_version for segment in trajectory.segments] == [3, 3, 3]
    assert trajectory.policy_version == 3
    assert trajectory.weights_of(trajectory.segments[1]) is trajectory.revisions[0]
    assert trajectory.stop_reason == "done" and len(trajectory.outcome.answers) == 2
    assert [answer.prediction for answer in trajectory.outcome.answers] == ["Lisbon", "Lisbon"]
    times = trajectory.timings
    phases = [times.act, times.extract, times.write, times.install, times.environment]
    assert min(phases[:3]) > 0 and min(phases) >= 0 and sum(phases) == pytest.approx(times.total)


@pytest.mark.parametrize(("answers", "expected"), [(None, 1.0), (0.0, 0.0), (0.3, 0.3)])
def test_answers_may_have_a_temperature_of_their_own(
    chat: ChatFormat, answers: float | None, expected: float
) -> None:
    policy = _talker(chat)
    _run(chat, policy, ScriptedWriter(), answer_temperature=answers)
    sampled_at = {(sampling.kind, sampling.temperature) for _, sampling, _ in policy.calls}
    assert sampled_at == {("extract", 1.0), ("act", expected)}


def test_segments_are_the_tokens_that_the_engine_saw_and_sampled(chat: ChatFormat) -> None:
    policy = _talker(chat)
    trajectory = _run(chat, policy, ScriptedWriter())
    spans = [(segment, span) for segment in trajectory.segments for span in segment.spans]
    assert len(spans) == len(policy.calls)
    for (segment, span), (prompt, _, adapter) in zip(spans, policy.calls, strict=True):
        assert tuple(segment.token_ids[: span.start]) == prompt
        assert adapter.revision == segment.revision
        engine = [-0.1 * (place + 1) for place in range(span.end - span.start)]
        assert np.allclose(segment.logprobs[span.start : span.end], engine)
    last = trajectory.segments[-1]
    assert chat.decode(last.token_ids).count("Lisbon") == 2  # earlier answers stay in the context
    questions = [question["question"] for question in TASK.payload["questions"]]
    assert all(question in chat.decode(last.token_ids) for question in questions)


def test_each_write_starts_from_the_current_b_and_sees_only_its_own_session(chat: ChatFormat) -> None:
    policy, writer = _talker(chat), ScriptedWriter()
    _run(chat, policy, writer)
    requests = [request for batch in writer.batches for request in batch]
    assert [request.weights.revision for request in requests] == [0, 1]
    first, second = (chat.decode(prompt) for prompt, sampling, _ in policy.calls if sampling.max_tokens > 8)
    assert TASK.payload["sessions"][0] in first and TASK.payload["sessions"][1] not in first
    assert TASK.payload["sessions"][1] in second and TASK.payload["sessions"][0] not in second


def test_b_goes_back_to_0_and_at_most_one_adapter_is_held(chat: ChatFormat) -> None:
    held: list[int] = []
    policy = _talker(chat)
    answer = policy._script

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        held.append(len(policy.installed))
        return answer(prompt_ids, sampling, adapter)

    policy._script = script
    _run(chat, policy, ScriptedWriter())
    assert held == [0, 1, 1, 1]
    assert policy.installed == {} and policy.released == ["v3/g.0@1", "v3/g.0@2"]


def test_a_question_is_answered_from_a_context_that_holds_it(chat: ChatFormat) -> None:
    """The session alone fits, session and question do not: the session is written before the question."""
    turn = len(chat.user(TASK.payload["sessions"][1])) + len(chat.system(ENVIRONMENT.system_prompt))
    policy = _talker(chat)
    trajectory = _run(chat, policy, ScriptedWriter(), MemoryConfig(max_context_tokens=turn + 5))
    question = TASK.payload["questions"][0]["question"]
    extracts = [chat.decode(prompt) for prompt, sampling, _ in policy.calls if sampling.max_tokens > 8]
    acts = [chat.decode(prompt) for prompt, sampling, _ in policy.calls if sampling.max_tokens == 8]
    assert f"user\n{question}\n" in acts[0] and not any(f"user\n{question}\n" in text for text in extracts)
    assert trajectory.segments[-1].revision == len(trajectory.revisions) >= 1


def test_without_memory_nothing_is_written_and_a_large_window_is_the_full_context(chat: ChatFormat) -> None:
    policy, writer = _talker(chat), ScriptedWriter()
    memory = MemoryConfig(policy="truncation", max_context_tokens=4096)
    (segment,) = _run(chat, policy, writer, memory).segments
    assert all(text in chat.decode(segment.token_ids) for text in TASK.payload["sessions"])
    assert writer.batches == [] and segment.revision == 0


def test_truncation_keeps_every_prompt_in_the_window(chat: ChatFormat) -> None:
    policy = _talker(chat)
    memory = MemoryConfig(policy="truncation", max_context_tokens=40)
    trajectory = _run(chat, policy, ScriptedWriter(), memory)
    assert all(len(prompt) <= 40 + len(chat.assistant_open) for prompt, _, _ in policy.calls)
    assert [len(segment.spans) for segment in trajectory.segments] == [1, 1]


def test_an_empty_or_rolled_back_write_leaves_the_revision(chat: ChatFormat) -> None:
    empty = _run(chat, _talker(chat, extraction="Sorry."), ScriptedWriter())
    assert [record.outcome for record in empty.writes] == ["empty", "empty"] and empty.revisions == ()
    outcomes = iter(["rolled_back", "accepted"])
    mixed = _run(chat, _talker(chat), ScriptedWriter(lambda request: next(outcomes)))
    outcomes = [(record.outcome, record.revision) for record in mixed.writes]
    assert outcomes == [("rolled_back", 0), ("accepted", 1)]
    assert [segment.revision for segment in mixed.segments] == [0, 0, 1]
    assert mixed.revisions[0].b[MODULE][0, 0] == 1


def test_sampling_seeds_depend_on_seed_and_event_alone(chat: ChatFormat) -> None:
    seeds = []
    for changes in ({}, {"episode_id": "other.1"}, {"seed": 6}):
        policy = _talker(chat)
        _run(chat, policy, ScriptedWriter(), **changes)
        seeds.append([sampling.seed for _, sampling, _ in policy.calls])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 4 and not set(seeds[0]) & set(seeds[2])
    assert derived_seed(0, 1) == 166676428 and derived_seed(0, 1) != derived_seed(1, 0)


def test_turns_are_limited_and_unanswered_questions_score_0(chat: ChatFormat) -> None:
    trajectory = _run(chat, _talker(chat), ScriptedWriter(), max_turns=1)
    assert trajectory.stop_reason == "max_turns"
    assert trajectory.outcome.answers[1].prediction == ""


def test_a_failed_receipt_is_raised_and_the_adapter_released(chat: ChatFormat) -> None:
    class Doubter(ScriptedPolicy):
        async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
            await super().install(key, weights, probe)
            raise ReceiptError("the adapter does not act")

    policy = Doubter(_talker(chat)._script)
    with pytest.raises(ReceiptError):
        _run(chat, policy, ScriptedWriter())
    assert policy.installed == {} and policy.released == ["v3/g.0@1"]


def test_a_refresh_in_mid_episode_is_refused(chat: ChatFormat) -> None:
    policy = _talker(chat)
    answer = policy._script

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        policy.version = 4
        return answer(prompt_ids, sampling, adapter)

    policy._script = script
    with pytest.raises(EngineError, match="began on policy version 3 and the engine is at 4"):
        _run(chat, policy, ScriptedWriter())


class _Reader:
    """Reads one long text, then asks."""

    name = "reader"
    system_prompt = "Read."
    text = "\n".join(f"Line {i} tells of thing {i * 7}." for i in range(60))

    def start(self, task: Task) -> Session:
        return _ReaderSession([Observation(self.text, False), Observation("What of thing 7?", True)])


class _ReaderSession:
    question = "What of thing 7?"

    def __init__(self, observations: list[Observation]) -> None:
        self._observations = observations

    def observe(self) -> Observation | None:
        return self._observations.pop(0) if self._observations else None

    def act(self, text: str) -> None:
        if text == "trap":
            raise TaskError("task t: the trap was sprung")

    def outcome(self) -> Outcome:
        return Outcome(1.0, {}, ())


def _read(chat: ChatFormat, window_tokens: int) -> Trajectory:
    async def play() -> Trajectory:
        around = replace(SURROUNDINGS, window_tokens=window_tokens)
        config = MemoryConfig(max_context_tokens=120, max_extract_tokens=64)
        memory, batcher = build_memory(config, WriteConfig(), around), WriteBatcher(ScriptedWriter())
        return await run_episode(_spec(), _Reader(), _talker(chat), batcher, chat, memory, "basis")

    trajectory = asyncio.run(play())
    read = "\n".join(chat.decode(segment.token_ids) for segment in trajectory.segments)
    assert all(line in read for line in _Reader.text.splitlines())
    # every extraction has its room in the window
    assert all(segment.spans[0].start + 64 <= window_tokens for segment in trajectory.segments)
    return trajectory


def test_an_observation_longer_than_the_window_is_read_in_pieces_and_all_of_it(chat: ChatFormat) -> None:
    trajectory = _read(chat, window_tokens=280)  # too little for two pieces and an extraction
    assert len(trajectory.writes) > 4
    assert all(segment.spans[0].start <= 120 + 120 + 120 for segment in trajectory.segments)


def test_a_text_longer_than_l_max_is_one_extraction_where_it_fits_the_window(chat: ChatFormat) -> None:
    text = len(chat.user(_Reader.text))
    assert text > 4 * 120
    assert len(_read(chat, window_tokens=text + 200).writes) == 1


@pytest.mark.parametrize("blind", [False, True])
def test_questions_are_no_news_and_are_cleared_without_an_extraction(chat: ChatFormat, blind: bool) -> None:
    """Four questions and answers overfill the context, in which nothing was told since the last session."""
    environment = RecallEnvironment(RecallConfig(sessions=2, facts_per_session=4, questions=4))
    task = next(environment.tasks("train", 0, 0))
    policy = _talker(chat, answer="I believe that it is Lisbon")
    memory = replace(EACH_SESSION, question_blind=blind)

    async def play() -> Trajectory:
        built, batcher = build_memory(memory, WriteConfig(), SURROUNDINGS), WriteBatcher(ScriptedWriter())
        return await run_episode(_spec(task=task), environment, policy, batcher, chat, built, "basis")

    trajectory = asyncio.run(play())
    kinds = [[span.kind for span in segment.spans] for segment in trajectory.segments]
    assert kinds[:2] == [["extract"], ["extract"]] and len(kinds) >= 4
    assert {kind for segment in kinds[2:] for kind in segment} == {"act"}
    assert len(trajectory.writes) == 2 and sum(map(len, kinds[2:])) == 4
    assert trajectory.memory_events == {"cleared_without_news": len(kinds) - 3}
