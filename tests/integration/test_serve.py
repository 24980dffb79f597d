"""A real server and the openai client: concurrent conversations answer as each does alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from actors.types import Flashcard
from cluster.assistant.memory_file import SavedMemory, load_memory, save_memory
from cluster.assistant.opening import prepare_opening
from tests.integration.assistant_cases import write_cards, write_run

ROOT = Path(__file__).parents[2]
QUESTION = "Where does Nora live?"
START_S = 300


@pytest.fixture(scope="module")
def saved(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and a folder of saved conversations: two of each of two memories.

    The cards are given: a random model writes no flashcards of its own.
    """
    run = write_run(tiny_model_path, tmp_path_factory.mktemp("runs") / "tiny-run")
    opening, folder = prepare_opening(str(run), None, ()), tmp_path_factory.mktemp("conversations")
    for name, answer in (("lisbon", "in Lisbon"), ("oslo", "high above Oslo, with Omar")):
        weights, log = write_cards(opening, [[Flashcard(QUESTION, answer)]])
        memory = SavedMemory(weights, opening.system_prompt, (), tuple(log), None)
        for number in (1, 2):
            save_memory(memory, opening, folder / f"{name}-{number}", overwrite=False)
    return run, folder


@pytest.fixture(scope="module")
def served(saved: tuple[Path, Path]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    run, folder = saved
    command = [sys.executable, "-m", "cluster", "serve", str(run), "--port", "0"]
    command += [f"assistant.save_dir={folder}", "engine.slots=3"]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        first_line = ThreadPoolExecutor(1).submit(
            lambda: next(line for line in process.stdout or () if line.startswith("serving tiny-run on "))
        )
        try:
            match = re.search(r"http://127\.0\.0\.1:\d+/v1", first_line.result(START_S))
            assert match is not None
            yield match[0], process
        finally:
            process.kill()


def test_conversations_own_their_memories_and_are_put_away_at_the_end(
    saved: tuple[Path, Path], served: tuple[str, subprocess.Popen[str]]
) -> None:
    url, process = served
    client = openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)
    model = client.models.list().data[0].id

    def ask(conversation: str, stream: bool = False) -> str:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
        if not stream:
            answer = client.chat.completions.create(
                model=model, messages=messages, extra_body={"conversation": conversation}
            )
            return answer.choices[0].message.content or ""
        pieces = client.chat.completions.create(
            model=model, messages=messages, stream=True, extra_headers={"X-Conversation-Id": conversation}
        )
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)

    kinds = ("lisbon", "oslo", "nobody")
    alone = [ask(f"{kind}-1") for kind in kinds]
    assert len(set(alone)) == 3, alone
    with ThreadPoolExecutor(3) as together:
        assert list(together.map(lambda kind: ask(f"{kind}-2", stream=True), kinds)) == alone

    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "?"}])
    with pytest.raises(openai.BadRequestError, match="conversation must be"):
        ask("../x")

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    run, folder = saved
    opening = prepare_opening(str(run), None, ())
    expected = {f"{kind}-{number}" for kind in kinds for number in (1, 2)}
    assert {path.name for path in folder.iterdir()} == expected
    again, foreign = load_memory(folder / "oslo-2", opening)
    assert (foreign, again.weights.revision) == ("", 1)
    assert again.cards[0].answer == "high above Oslo, with Omar"
    assert len(again.context_ids) > 10
