"""The rows of the comparison beside TMEM, played as whole episodes.

What each keeps, clears and writes, and which of them are equal by definition.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence

import pytest

from actors.environments.base import Observation, Session
from actors.episodes.episode import EpisodeSpec
from actors.episodes.rollout import WriteBatcher
from actors.memory.build import build_memory
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Outcome, Sampling, Task, Trajectory
from configs.schema import MemoryConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, run_episode, sampled

TEXTS = tuple(
    f"Story {number}. Nora moved to town number {number * 7} and met friend number {number * 3} there "
    f"in the month {number}."
    for number in range(5)
)
CARDS = '[{"instruction": "Who moved?", "output": "Nora"}]'
LIMIT = 75  # a full context holds two stories or three
WRITE = WriteConfig(max_example_tokens=64)


class _Stories:
    """Five stories, then two questions, or more than a context holds."""

    name = "stories"
    system_prompt = "Be brief."

    def __init__(self, whens: Sequence[str] = ("first", "last"), telling: bool = True) -> None:
        self._whens = whens
        self._telling = telling  # whether a question counts as news

    def tasks(self, split: str, seed: int, start: int) -> Iterator[Task]:
        raise NotImplementedError

    def start(self, task: Task) -> Session:
        stories = [Observation(text, False) for text in TEXTS]
        questions = [Observation(f"Where is Nora {when}?", True, self._telling) for when in self._whens]
        return _Telling(stories + questions)


class _Telling:
    question = "Where is Nora?"

    def __init__(self, observations: list[Observation]) -> None:
        self._observations = observations

    def observe(self) -> Observation | None:
        return self._observations.pop(0) if self._observations else None

    def act(self, text: str) -> None:
        pass

    def outcome(self) -> Outcome:
        return Outcome(1.0, {}, ())


def _play(
    chat: ChatFormat,
    policy: ScriptedPolicy,
    memory: MemoryConfig,
    write: WriteConfig = WRITE,
    writer: ScriptedWriter | None = None,
    stories: _Stories | None = None,
) -> Trajectory:
    spec = EpisodeSpec(Task("t", "stories", {}, 0), "g.0", 1.0, 8, 64, seed=5)

    async def play() -> Trajectory:
        built, batcher = build_memory(memory, write, SURROUNDINGS), WriteBatcher(writer or ScriptedWriter())
        return await run_episode(spec, stories or _Stories(), policy, batcher, chat, built, "basis")

    return asyncio.run(play())


def _says(chat: ChatFormat, extraction: str) -> ScriptedPolicy:
    """Says ``extraction`` when asked to remember, "Lisbon" when asked a question."""

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply(extraction if sampling.kind == "extract" else "Lisbon"))

    return ScriptedPolicy(script)


def _babbles(chat: ChatFormat) -> ScriptedPolicy:
    """Says what prompt, seed and temperature alone determine, as an engine does."""

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        assert adapter.revision == 0
        digest = hashlib.sha256(f"{tuple(prompt_ids)} {sampling}".encode()).hexdigest()
        return sampled(chat.reply(f"notes {digest[:6]}"))

    return ScriptedPolicy(script)


def _memory(policy: str, limit: int = LIMIT, question_blind: bool = False) -> MemoryConfig:
    return MemoryConfig(
        policy=policy,
        max_context_tokens=limit,
        max_summary_tokens=32,
        max_extract_tokens=64,
        question_blind=question_blind,
    )  # type: ignore[arg-type]


def _prompts(chat: ChatFormat, policy: ScriptedPolicy, kind: str) -> list[str]:
    return [chat.decode(prompt) for prompt, sampling, _ in policy.calls if sampling.kind == kind]


def _tokens(trajectory: Trajectory) -> list[list[int]]:
    return [segment.token_ids.tolist() for segment in trajectory.segments]


def test_a_full_context_becomes_a_summary_that_the_next_one_begins_with(chat: ChatFormat) -> None:
    policy = _says(chat, "Nora moves a lot.")
    trajectory = _play(chat, policy, _memory("summary"))
    first, *later = _prompts(chat, policy, "extract")
    assert later and TEXTS[0] in first and "Nora moves a lot." not in first and "Where is Nora?" in first
    remembered = "notes on what came before:\nNora moves a lot."
    assert all(remembered in prompt and TEXTS[0] not in prompt for prompt in later)
    assert all("Nora moves a lot." in prompt for prompt in _prompts(chat, policy, "act"))
    assert trajectory.memory_events == {"summaries": len(later) + 1} and trajectory.writes == ()
    kinds = [span.kind for segment in trajectory.segments for span in segment.spans]
    assert kinds.count("extract") == len(later) + 1  # a summary is an action to learn from


def test_an_empty_summary_is_counted_and_does_not_overwrite(chat: ChatFormat) -> None:
    said = iter(["Nora moved.", "", ""])

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply(next(said) if sampling.kind == "extract" else "Lisbon"))

    policy = ScriptedPolicy(script)
    trajectory = _play(chat, policy, _memory("summary"))
    assert trajectory.memory_events["summaries"] == 1 and trajectory.memory_events["empty_summaries"] >= 1
    assert all("Nora moved." in prompt for prompt in _prompts(chat, policy, "act"))


def test_a_question_blind_summary_does_not_see_the_question(chat: ChatFormat) -> None:
    policy = _says(chat, "Nora moved.")
    _play(chat, policy, _memory("summary", question_blind=True))
    assert not any("Where is Nora?" in prompt for prompt in _prompts(chat, policy, "extract"))


def test_the_state_replaces_every_turn_that_was_read_or_answered(chat: ChatFormat) -> None:
    policy = _says(chat, "Nora is on the move.")
    trajectory = _play(chat, policy, _memory("state"))
    prompts = _prompts(chat, policy, "extract")
    # the first question's turn is consolidated before the second
    assert len(prompts) == len(TEXTS) + 1 == trajectory.memory_events["summaries"]
    for number, prompt in enumerate(prompts[: len(TEXTS)]):
        assert [text in prompt for text in TEXTS] == [place == number for place in range(len(TEXTS))]
        assert ("Nora is on the move." in prompt) == (number > 0)
    first, second = _prompts(chat, policy, "act")
    assert not any(text in first + second for text in TEXTS) and "first" in first and "first" not in second


def test_the_raw_write_is_every_token_of_the_context_and_nothing_is_asked(chat: ChatFormat) -> None:
    policy, writer = _says(chat, "unused"), ScriptedWriter()
    trajectory = _play(chat, policy, _memory("raw"), writer=writer)
    opening = chat.system(_Stories.system_prompt)
    told = [token for text in TEXTS for token in chat.user(text)]
    written = [
        token for record in trajectory.writes for example in record.examples for token in example.answer_ids
    ]
    assert _prompts(chat, policy, "extract") == [] and len(trajectory.writes) >= 2
    assert written == told[: len(written)] and len(told) - len(written) <= LIMIT
    assert all(example.prompt_ids == opening for record in trajectory.writes for example in record.examples)
    examples = [example for record in trajectory.writes for example in record.examples]
    lengths = [len(example.prompt_ids) + len(example.answer_ids) for example in examples]
    assert max(lengths) <= WRITE.max_example_tokens
    asked = [request.examples for batch in writer.batches for request in batch]
    assert asked == [record.examples for record in trajectory.writes]


def test_the_summary_is_written_and_not_shown(chat: ChatFormat) -> None:
    summary = "Nora moved to town 7. " * 12
    policy = _says(chat, summary)
    trajectory = _play(chat, policy, _memory("summary_write"))
    (record, *_) = trajectory.writes
    said = "".join(chat.decode(example.answer_ids) for example in record.examples)
    assert record.outcome == "accepted" and record.extraction == summary.strip() and len(record.examples) > 1
    assert "".join(said.split()) == "".join(summary.split())
    assert not any("town 7." in prompt and TEXTS[1] not in prompt for prompt in _prompts(chat, policy, "act"))
    empty = _play(chat, _says(chat, " "), _memory("summary_write"))
    reasons = {(record.outcome, record.reason) for record in empty.writes}
    assert reasons == {("empty", "the model wrote nothing")}


def test_every_document_has_its_own_write_of_implications(chat: ChatFormat) -> None:
    policy = _says(chat, "- Nora lives in a town.\n\n* She has a friend.\n- Nora lives in a town.")
    trajectory = _play(chat, policy, _memory("implications"))
    assert len(trajectory.writes) == len(TEXTS) and trajectory.memory_events["implications"] == 2 * len(TEXTS)
    lines = [chat.decode(example.answer_ids) for example in trajectory.writes[0].examples]
    assert len(lines) == 2 and "Nora lives in a town." in lines[0] and "She has a friend." in lines[1]
    assert [segment.revision for segment in trajectory.segments] == list(range(len(TEXTS) + 1))


def test_the_hybrid_has_summary_and_writes(chat: ChatFormat) -> None:
    said = iter([f"Nora, part {number}." if number % 2 == 0 else CARDS for number in range(20)])

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply(next(said) if sampling.kind == "extract" else "Lisbon"))

    policy = ScriptedPolicy(script)
    trajectory = _play(chat, policy, _memory("hybrid"))
    assert len(trajectory.writes) == trajectory.memory_events["summaries"] >= 2
    assert {record.outcome for record in trajectory.writes} == {"accepted"}
    assert trajectory.writes[0].flashcards[0].answer == "Nora"
    assert [segment.revision for segment in trajectory.segments] == list(range(len(trajectory.writes) + 1))
    assert "Nora, part 0." in _prompts(chat, policy, "extract")[2]


@pytest.mark.parametrize(("with_writes", "without"), [("hybrid", "summary"), ("parametric", "truncation")])
def test_with_t_the_identity_a_writing_agent_is_the_agent_without_writes_to_the_token(
    chat: ChatFormat, with_writes: str, without: str
) -> None:
    """The engine's words depend on every token of the prompt and on the seed of each event."""
    identity = WriteConfig(epochs=0)
    writing, plain = (_play(chat, _babbles(chat), _memory(row), identity) for row in (with_writes, without))
    assert _tokens(writing) == _tokens(plain) and len(writing.segments) >= 2
    assert writing.writes == () and writing.revisions == ()


def test_the_full_context_is_cut_only_at_the_engines_window(chat: ChatFormat) -> None:
    policy = _says(chat, "unused")
    (segment,) = _play(chat, policy, _memory("full", limit=40)).segments
    assert all(text in chat.decode(segment.token_ids) for text in TEXTS)


@pytest.mark.parametrize("row", ["parametric", "hybrid", "summary", "raw", "summary_write", "implications"])
def test_a_context_of_questions_alone_is_cleared_without_an_extraction_or_a_write(
    chat: ChatFormat, row: str
) -> None:
    whens = [f"in the month {number} of the year" for number in range(12)]
    policy = _says(chat, CARDS)
    told, asked = (
        _play(chat, _says(chat, CARDS), _memory(row), stories=_Stories(whens, telling=True)),
        _play(chat, policy, _memory(row), stories=_Stories(whens, telling=False)),
    )
    cleared = asked.memory_events["cleared_without_news"]
    assert cleared >= 2 and "cleared_without_news" not in told.memory_events
    moved_out = [len(_extractions(trajectory)) + len(trajectory.writes) for trajectory in (told, asked)]
    assert moved_out[1] < moved_out[0]
    if row in ("hybrid", "summary"):  # the summary stays
        assert all(CARDS in prompt for prompt in _prompts(chat, policy, "act")[-cleared:])


def _extractions(trajectory: Trajectory) -> list[str]:
    return [span.kind for segment in trajectory.segments for span in segment.spans if span.kind == "extract"]
