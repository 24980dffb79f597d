"""What a harness may ask of its endpoint, where its calls end, and what fails it."""

from __future__ import annotations

import asyncio
import re
import time
from types import ModuleType

import numpy as np
import pytest

from actors.environments.build import build_environment
from actors.environments.harness_process import _ended
from actors.episodes.recovery import Recovery
from actors.text.chat_template import ChatFormat
from actors.types import Task
from cluster.fleet.episode_journal import GroupJournal
from configs.load import ConfigError, load_config
from configs.schema import EmbedderConfig
from tests.unit.rollout_fakes import SURROUNDINGS
from tests.unit.test_harness import MODULE, fault, function, only, play, request_of, rollout_in, user

__all__ = ["user"]  # fixtures


LINE = MODULE[: MODULE.index("# this line")].count("\n") + 1


def test_an_episode_of_a_lost_worker_goes_on_with_the_harness_played_again(
    chat: ChatFormat, user: ModuleType
) -> None:
    environment = build_environment(function("talks", "bare"), EmbedderConfig())
    journal, trajectories = GroupJournal(10**6), []
    for reissued in (False, True):
        rollout = rollout_in(chat, environment)
        recovery = Recovery(journal, reissued, journal.progress("g"))
        group, recovered = asyncio.run(rollout.recoverable_group(request_of(environment), recovery))
        trajectories.append(only(group))
        assert recovered.continued == reissued
    first, second = trajectories
    pairs = list(zip(first.segments, second.segments, strict=True))
    assert len(pairs) >= 3 and all(np.array_equal(one.token_ids, other.token_ids) for one, other in pairs)


def test_siblings_have_channels_of_their_own(chat: ChatFormat, user: ModuleType) -> None:
    group = play(chat, function("talks"), size=4)
    assert len(group.trajectories) == 4 and group.failed == ()


def test_what_a_call_may_ask_for_and_what_is_refused_by_name(chat: ChatFormat, user: ModuleType) -> None:
    trajectory = only(play(chat, function("probes", "bare"), context=500, most=32))
    seen = user.seen
    assert seen["models"] == ["policy"]
    for field in ("n", "temperature", "top_p", "top_k", "seed", "logprobs", "response_format"):
        assert seen[field][0] == 400 and seen[field][1].startswith(f"{field} is not supported"), seen[field]
    assert seen["seed"][1].endswith("environment.harness.ignored_fields=[seed]")
    assert "ignored_fields" not in seen["n"][1]
    assert seen["key"][0] == 401 and "api_key" in seen["key"][1]
    assert seen["path"][0] == 404 and "only /v1/chat/completions" in seen["path"][1]
    assert seen["example"] == seen["nothing new"]
    assert seen["late"] == (400, "messages[2]: a system message can only be the first")
    assert seen["edited"][0] == 409 and seen["edited"][1].startswith("messages[1] is not what was said")
    assert seen["branch"][0] == 409 and seen["branch"][1].startswith("messages[2] is missing")
    assert seen["reply"][0] == 409 and seen["shorter"][0] == 409
    assert seen["nothing new"] == (400, "the last message must be the user's, or a tool's")
    assert seen["retry"] == "Nora, in Lisbon, 1."  # as it was: it is not sampled again
    assert (seen["stream"], seen["finish"]) == ("Nora,", "length")
    (segment,) = trajectory.segments
    assert len(segment.spans) == 2 and seen["usage"] == 3
    assert [turn.text for turn in chat.turns(segment.token_ids.tolist())[-5:]] == [
        "Hello?",
        "Are you there?",
        "Nora, in Lisbon, 1.",
        "Good.",
        "Nora,",
    ]
    assert (trajectory.outcome.reward, trajectory.outcome.reward_parts) == (1.0, {"polite": 0.5})


def test_a_stop_text_ends_the_reply_and_what_is_behind_it_is_not_trained(
    chat: ChatFormat, user: ModuleType
) -> None:
    def stops(base_url: str, api_key: str, task: Task) -> float:
        client = user.client_of(base_url, api_key)
        first = user.asks(client, "Hello?", stop=["Omar", "bon, "]).choices[0]
        history = [{"role": "user", "content": "Hello?"}, first.message, {"role": "user", "content": "And?"}]
        second = client.chat.completions.create(model="m", messages=history).choices[0]
        user.seen["stops"] = (first.message.content, first.finish_reason, second.message.content)
        return 0.5

    user.stops = stops  # type: ignore[attr-defined]
    (segment,) = only(play(chat, function("stops"), context=500)).segments
    assert user.seen["stops"] == ("Nora, in Lis", "stop", "Nora, in Lisbon, 2.")
    said = [segment.token_ids[span.start : span.end].tolist() for span in segment.spans]
    whole = list(chat.reply("Nora, in Lisbon, 1."))
    assert said[0] == whole[: len(said[0])] and chat.decode(said[0]).startswith("Nora, in Lisbon,")
    assert "1" not in chat.decode(said[0])
    assert [turn.role for turn in chat.turns(segment.token_ids.tolist())][-4:] == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_a_message_longer_than_the_window_is_read_in_pieces(chat: ChatFormat, user: ModuleType) -> None:
    def reads(base_url: str, api_key: str, task: Task) -> float:
        text = " ".join(f"Nora met {name} in Lisbon." for name in range(900)) + " Whom did she meet first?"
        user.asks(user.client_of(base_url, api_key), text)
        return 0.5

    user.reads = reads  # type: ignore[attr-defined]
    trajectory = only(play(chat, function("reads", "bare"), context=1000))
    assert len(trajectory.writes) >= 3
    assert max(len(segment.token_ids) for segment in trajectory.segments) < SURROUNDINGS.window_tokens
    assert "meet first?" in chat.decode(trajectory.segments[-1].token_ids.tolist())


def test_a_second_branch_at_the_same_time_is_refused(chat: ChatFormat, user: ModuleType) -> None:
    only(play(chat, function("parallel", "bare")))
    assert sorted(user.seen["parallel"]) == ["200", "409"]


def test_fields_that_the_run_replaces(chat: ChatFormat, user: ModuleType) -> None:
    def hot(base_url: str, api_key: str, task: Task) -> None:
        user.asks(user.client_of(base_url, api_key), "Hello?", temperature=0.7, extra_body={"top_k": 4})

    user.hot = hot  # type: ignore[attr-defined]
    trajectory = only(play(chat, function("hot", ignored_fields=("temperature", "top_k"))))
    assert trajectory.outcome.answers[0].prediction == "Nora, in Lisbon, 1."  # it said nothing itself
    with pytest.raises(ConfigError, match=r"environment.harness.ignored_fields=.*some of temperature, top_p"):
        load_config(None, ["environment.harness.ignored_fields=[stop]"])


def test_the_turn_limit_ends_the_calls_and_the_harness_may_still_give_its_reward(
    chat: ChatFormat, user: ModuleType
) -> None:
    trajectory = only(play(chat, function("endless", "bare"), max_turns=3))
    assert trajectory.stop_reason == "max_turns" and trajectory.outcome.reward == 7
    assert user.seen["endless"] == (410, "all rollout.max_turns replies are given")


def test_a_harness_that_the_turn_limit_ends_is_scored_by_its_last_reply(
    chat: ChatFormat, user: ModuleType
) -> None:
    trajectory = only(play(chat, function("stubborn"), max_turns=3))
    assert trajectory.stop_reason == "max_turns" and trajectory.outcome.reward == pytest.approx(0.4)
    assert trajectory.outcome.answers[0].prediction == "Nora, in Lisbon, 3."
    assert "gave no reward, and the task has no answer" in fault(
        play(chat, function("stubborn", "bare"), max_turns=3)
    )


@pytest.mark.parametrize(
    ("line", "with_answer", "without"),
    [("1984", "1984", 1984), ("Nora", "Nora", None), ('{"reward": 1}', {"reward": 1}, {"reward": 1})],
)
def test_a_number_in_a_commands_last_line_is_the_answer_where_there_is_one(
    line: str, with_answer: object, without: object
) -> None:
    given = [_ended("agent", 0, line, "", has_answer).result for has_answer in (True, False)]
    assert given == [with_answer, without] and [type(each) for each in given] == [
        type(with_answer),
        type(without),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", rf"KeyError: 'no such key' \(.*my_harness.py:{LINE}\)"),
        ("silent", r"the harness ended without one call: it must call OPENAI_BASE_URL"),
        ("odd", r"the harness gave rewards: its result must be a number \(the reward\), a text"),
        ("says_nothing", r"the harness gave no reward, and the task has no answer"),
        ("probes.", r"harness.function=.my_harness:probes"),
    ],
)
def test_a_harness_that_fails_is_one_failed_episode(
    chat: ChatFormat, user: ModuleType, name: str, message: str
) -> None:
    if name.endswith("."):
        with pytest.raises(ValueError, match=message):
            function(name)
    else:
        assert re.search(message, fault(play(chat, function(name, "bare"))))


def test_the_answer_is_scored_by_the_task(chat: ChatFormat, user: ModuleType) -> None:
    outcome = only(play(chat, function("answers"))).outcome
    assert outcome.answers[0].gold == ("Nora",) and outcome.answers[0].prediction == "Nora, I say"
    assert outcome.reward == outcome.reward_parts["f1"] == pytest.approx(0.5)


def test_a_harness_that_makes_no_next_call_is_late(chat: ChatFormat, user: ModuleType) -> None:
    started = time.monotonic()
    message = fault(play(chat, function("waits"), limit_s=2.0))
    assert "did not answer within rollout.environment_timeout_s=2" in message
    assert time.monotonic() - started < 50


def test_replies_that_were_not_sampled_are_context(chat: ChatFormat, user: ModuleType) -> None:
    def shows(base_url: str, api_key: str, task: Task) -> float:
        example = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
        messages = [*example, {"role": "user", "content": "2?"}]
        client = user.client_of(base_url, api_key)
        answer = client.chat.completions.create(model="m", messages=messages).choices[0].message
        messages += [answer, {"role": "assistant", "content": "So."}, {"role": "user", "content": "3?"}]
        client.chat.completions.create(model="m", messages=messages)
        return 0.5

    user.shows = shows  # type: ignore[attr-defined]
    (segment,) = only(play(chat, function("shows", "bare"), context=500)).segments
    turns = chat.turns(segment.token_ids.tolist())
    assert [(turn.role, turn.text) for turn in turns[-7:]] == [
        ("user", "1?"),
        ("assistant", "2"),
        ("user", "2?"),
        ("assistant", "Nora, in Lisbon, 1."),
        ("assistant", "So."),
        ("user", "3?"),
        ("assistant", "Nora, in Lisbon, 2."),
    ]
    sampled_ids = [segment.token_ids[span.start : span.end].tolist() for span in segment.spans]
    assert [chat.said(ids) for ids in sampled_ids] == ["Nora, in Lisbon, 1.", "Nora, in Lisbon, 2."]
