"""Environments of verifiers, played by a scripted policy."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.environments.base import Environment
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from configs.load import ConfigError, load_config
from configs.schema import (
    EnvironmentConfig,
    VerifiersConfig,
)
from tests.unit.ecosystem_cases import (
    ROOT,
    build,
    ended,
    failure,
    first_task,
    modules_in,
    play,
    run_of,
)


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with modules_in(tmp_path_factory.mktemp("modules")) as folder:
        yield folder


def test_verifiers_rows_are_tasks_and_the_rubric_is_the_reward(
    chat: ChatFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = build(run_of(3))
    train = [first_task(environment, position=position) for position in range(8)]
    held_out = list(environment.tasks("eval", 0, 0))
    asked = {task.payload["question"] for task in train}
    assert len(asked) == 4 and len(held_out) == 1 and held_out[0].payload["question"] not in asked
    task, turns = train[0], list[str]()
    assert task.system_prompt == "Say one word."

    def second(last: str) -> str:
        turns.append(last)
        return "hm" if len(turns) == 1 else str(task.payload["answer"])

    (episode,) = ended(play(chat, environment, task, second, siblings=1))
    assert turns == [task.payload["question"], "No, not hm. Once more."]
    assert episode.outcome.reward == 1.0 and episode.outcome.reward_parts == {"right": 1.0, "num_turns": 2.0}
    assert chat.decode(episode.segments[0].token_ids).count("Say one word.") == 1
    right, wrong = (
        ended(play(chat, environment, task, lambda _: reply, siblings=1))[0].outcome  # noqa: B023
        for reply in (str(task.payload["answer"]), "hm")
    )
    assert (right.reward, right.reward_parts["num_turns"]) == (1.0, 1.0)
    assert (wrong.reward, wrong.reward_parts["num_turns"]) == (0.0, 2.0)
    assert capfd.readouterr() == ("", ""), "no progress bars, no warnings of the libraries"


def test_an_address_of_openenv_with_a_secret_is_refused_unseen() -> None:
    for url in ("http://me:hunter2@host", "http://host?key=hunter2"):
        with pytest.raises(ConfigError, match=r"url='\(hidden\)' is not allowed"):
            load_config(ROOT / "configs/quickstart.yaml", [f"environment.openenv.url={url}"])


def _worse(answers: str, **args: object) -> Environment:
    config = VerifiersConfig(id="my_worse", args={"answers": answers, **args})
    return build(EnvironmentConfig(name="verifiers", verifiers=config))


def test_verifiers_scores_a_rollout_that_the_turn_limit_has_cut(chat: ChatFormat) -> None:
    import my_worse

    my_worse.Steps.ended.clear()
    environment = _worse("a")
    whole, cut = (
        ended(play(chat, environment, first_task(environment), lambda _: "hm", 3, most)) for most in (9, 2)
    )
    assert {episode.outcome.reward for episode in whole} == {2.0}, "half of four turns"
    assert {episode.outcome.reward for episode in cut} == {1.0} and my_worse.Steps.ended == ["a"] * 6


@pytest.mark.parametrize(
    ("answers", "rubric", "said"),
    [
        ("raise", "turns", r"ZeroDivisionError: division by zero \(my_worse\.py:\d+\)$"),
        ("own", "turns", r"ToolError: the shop is closed \(my_worse\.py:\d+\)$"),
        ("cheap", "price", r"outcome: KeyError: 'cheap' \(my_worse\.py:\d+\)$"),
        ("a", "nothing", r"TypeError: float\(\) argument must be .* not 'NoneType'"),
        ("rewrite", "turns", r"it shows the agent 0 of its 1 replies"),
    ],
)
def test_verifiers_faults_have_an_owner(chat: ChatFormat, answers: str, rubric: str, said: str) -> None:
    environment = _worse(answers, rubric=rubric)
    assert re.search(said, failure(play(chat, environment, first_task(environment), lambda _: "hm")))


def test_a_session_of_verifiers_that_is_closed_early_cleans_up() -> None:
    import my_worse

    my_worse.Steps.ended.clear()
    environment = _worse("a")

    async def play() -> None:
        session: Any = await environment.start(first_task(environment))  # type: ignore[misc]
        assert (await session.observe()).text == "Say a."
        await session.close()
        assert my_worse.Steps.ended == ["a"]

    asyncio.run(play())


def test_what_verifiers_cannot_give_is_said_at_once() -> None:
    import signal

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TaskError, match=r"verifiers\.id=my_worse: its rubric scores the siblings"):
        _worse("a", rubric="group")
    with pytest.raises(TaskError, match=r"verifiers\.id=my_worse: KeyError: 'answers' \(my_worse\.py:\d+\)"):
        _worse("none")
    with pytest.raises(
        TaskError, match=r"verifiers\.id=no-env: ModuleNotFoundError: No module named 'no_env'"
    ):
        build(EnvironmentConfig(name="verifiers", verifiers=VerifiersConfig(id="no-env")))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with ThreadPoolExecutor() as threads:  # a worker may build it in a thread
        assert threads.submit(_worse, "a").result().name == "verifiers"
