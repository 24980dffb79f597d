"""The engine's window: in the least that is allowed no prompt and no reply of an episode is ever cut."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.environments.base import Observation, ReadThenAsk, Session
from actors.episodes.episode import EpisodeSpec
from actors.episodes.rollout import WriteBatcher
from actors.memory.build import build_memory
from actors.memory.parametric import require_window
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Outcome, Sampling, Task
from cluster.cli import main
from configs.load import load_config
from configs.schema import RunConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, run_episode, sampled

QUESTION = "Where does Nora live now, and where did she live before?"


class _Novel:
    """Texts of all lengths, from a word to some multiples of L_max; then questions, which tell something."""

    name = "novel"
    system_prompt = "You read a novel. Answer questions on it in a few words, or in one where one will do."

    def start(self, task: Task) -> Session:
        return _Reading()


class _Reading(ReadThenAsk):
    def __init__(self) -> None:
        draw = random.Random(0)
        words = ["Nora", "moved", "to", "Lisbon.", "Then", "it", "rained\n", "all", "day."]
        texts = [" ".join(draw.choices(words, k=draw.choice([1, 9, 40, 100, 300]))) for _ in range(30)]
        super().__init__(texts, [QUESTION])
        questions = [Observation(QUESTION, True) for _ in range(4)]
        self._observations = itertools.chain(questions, list(self._observations), questions)
        self._unanswered = 9

    def outcome(self) -> Outcome:
        return Outcome(1.0, {}, ())


def _config(policy: str, *more: str) -> RunConfig:
    sizes = ("max_context_tokens=128", "max_extract_tokens=40", "max_summary_tokens=24")
    settings = [f"memory.policy={policy}", "sampling.max_answer_tokens=12", *(f"memory.{s}" for s in sizes)]
    return load_config(None, [*settings, *more])


def _least(config: RunConfig, chat: ChatFormat) -> int:
    with pytest.raises(ValueError, match="or more") as refused:
        require_window(_with_window(config, 200), chat, [QUESTION, "Who?"])
    found = re.search(r"must be (\d+) or more", str(refused.value))
    assert found is not None
    return int(found[1])


def _with_window(config: RunConfig, tokens: int) -> RunConfig:
    return replace(config, engine=replace(config.engine, max_model_tokens=tokens))


@pytest.mark.parametrize("wordings", [1, 2])
@pytest.mark.parametrize("policy", ["parametric", "hybrid"])
def test_in_the_least_window_every_reply_has_its_room(chat: ChatFormat, policy: str, wordings: int) -> None:
    config = _config(policy, f"memory.wordings={wordings}")
    least = _least(config, chat)
    require_window(_with_window(config, least), chat, [QUESTION, "Who?"])
    numbers = itertools.count()

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        """Replies are as long as they may be; extractions are full of new cards."""
        card = f'{{"instruction": "What is {next(numbers)}?", "output": "a number of {next(numbers)}"}}'
        ids = chat.encode(f"[{card}]" if sampling.kind == "extract" else card)
        filled = (ids + chat.encode("and so on " * sampling.max_tokens))[: sampling.max_tokens]
        return sampled(filled, "length")

    talker = ScriptedPolicy(script)

    async def play() -> None:
        around = replace(SURROUNDINGS, window_tokens=least, answer_tokens=12)
        memory, batcher = build_memory(config.memory, config.write, around), WriteBatcher(ScriptedWriter())
        spec = EpisodeSpec(Task("t", "novel", {}, 0), "g.0", 1.0, 12, 64, seed=5)
        await run_episode(spec, _Novel(), talker, batcher, chat, memory, "basis")  # type: ignore[arg-type]

    asyncio.run(play())
    needed = [len(prompt) + sampling.max_tokens for prompt, sampling, _ in talker.calls]
    assert len(needed) > 20 and max(needed) <= least
    assert max(needed) > 0.9 * least  # and it asks for little more


def test_what_asks_for_no_flashcards_needs_no_room_for_them(chat: ChatFormat) -> None:
    for config in (_config("truncation"), _config("notes"), _config("parametric", "write.epochs=0")):
        require_window(_with_window(config, 200), chat, [QUESTION])


def test_a_blind_prompt_has_no_question(chat: ChatFormat) -> None:
    settings = [f"memory.question_blind={value}" for value in ("false", "true")]
    seeing, blind = (_least(_config("parametric", setting), chat) for setting in settings)
    assert seeing - blind > len(chat.encode(QUESTION))


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "MODEL", "engine.max_model_tokens=1024", "memory.max_context_tokens=512", "--port", "0"],
        ["chat", "MODEL", "engine.max_model_tokens=1024", "memory.max_context_tokens=512"],
        ["train", "quickstart", "engine.max_model_tokens=180", "output_dir=FOLDER"],
    ],
)
def test_each_command_says_it_in_one_line(
    words: list[str], tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(tiny_model_path), "FOLDER": str(tmp_path)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: engine\.max_model_tokens=\d+ is not allowed: it must be \d+ or more: ", said)
    assert not list(tmp_path.iterdir())  # nothing was begun
