"""``engram try``: a task of an environment with a user's own replies, without Ray and without weights."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.inspection.trial import Replies, Trial, try_task
from configs.load import load_config
from configs.shipped import shipped
from tests.conftest import TOKENIZER_FILES

SHOP = """
from actors.environments.base import Observation
from actors.types import Answer, Outcome, Task

class Shop:
    name, system_prompt = "shop", "You buy things."
    def __init__(self, options): self.options = options
    def tasks(self, split, seed, start):
        return iter([Task(f"{split}-{n}", "shop", {"price": n + 3}, 0) for n in range(start, 3)])
    def start(self, task): return Session(task, self.options.get("items", 2))

class Session:
    question = "Buy."
    def __init__(self, task, items): self.price, self.left, self.sum = task.payload["price"], items, 0
    def observe(self):
        if self.left:
            return Observation(f"Item {self.left} costs {self.price} coins. How many?", True)
    def act(self, text):
        self.sum += int(text)
        self.left -= 1
    def outcome(self): return Outcome(float(self.sum), {"sum": float(self.sum)}, ())

class Wanting(Session):
    def close(self): raise OSError("the till is locked")

class Till(Shop):
    def start(self, task): return Wanting(task, 1)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Write the user's module; returns the line that can raise."""
    (tmp_path / "my_shop.py").write_text(SHOP, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_shop", raising=False)
    return SHOP.splitlines().index("        self.sum += int(text)") + 1


@pytest.fixture
def tokenizer(model_path: Path, tmp_path: Path) -> str:
    """A folder with a tokenizer and no weights, as a setting."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in TOKENIZER_FILES:
        shutil.copy(model_path / file, folder / file)
    return f"model.name={folder}"


def _tried(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> tuple[int, str, str]:
    status = main(["try", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_an_environment_of_ones_own_is_played_with_scripted_replies(
    shop: int, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = _tried(
        capsys, ["my_shop:Shop", tokenizer, "--reply", "1", "--reply", "2", "--task", "1"]
    )
    assert (status, err) == (0, "")
    assert "shop · task train-1 (train)" in out and "system prompt, 4 tokens\n  You buy things." in out
    told = [line for line in out.splitlines() if "costs 4 coins" in line]
    assert told == ["  Item 2 costs 4 coins. How many?", "  Item 1 costs 4 coins. How many?"]
    assert "agent, 2 tokens (reply 2)\n  2" in out and "reward 3 (sum 3)" in out
    replies = tmp_path / "replies.txt"
    replies.write_text('"1"\n7\n', encoding="utf-8")
    words = [
        "my_shop:Shop",
        tokenizer,
        "environment.options.items=3",
        "--replies",
        str(replies),
        "--split",
        "eval",
    ]
    status, out, err = _tried(capsys, words)
    assert status == 1 and "task eval-0" in out and "(no reply is left: it says nothing)" in out
    assert err == (
        "fault: task eval-0: the environment shop's act: ValueError: "
        f"invalid literal for int() with base 10: '' (my_shop.py:{shop})\n"
    )


def test_the_example_of_the_readme_is_played(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "actors" / "README.md").read_text(encoding="utf-8")
    module = re.search(r"```python\n(.*?)```", text.split("## Your own parts")[1], re.DOTALL)
    command = re.search(r"^engram try (my_tasks:.*)$", text, re.MULTILINE)
    assert module is not None and command is not None
    (tmp_path / "my_tasks.py").write_text(module[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    status, out, err = _tried(capsys, [*shlex.split(command[1]), tokenizer])
    assert (status, err) == (0, "") and "lamps came in" in out and "reward" in out


def test_a_fault_has_the_users_file_and_line_and_exit_status_1(
    shop: int, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = _tried(capsys, ["my_shop:Shop", tokenizer, "--reply", "many"])
    assert status == 1 and "  many" in out and "reward" not in out
    assert f"'many' (my_shop.py:{shop})" in err and err.count("\n") == 1


def test_a_fault_of_close_is_told_where_it_is_the_only_one(
    shop: int, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = _tried(capsys, ["my_shop:Till", tokenizer, "--reply", "many"])
    assert status == 1 and f"'many' (my_shop.py:{shop})" in err and "locked" not in err
    status, _, err = _tried(capsys, ["my_shop:Till", tokenizer, "--reply", "1"])
    assert status == 1 and "close: OSError: the till is locked (my_shop.py:" in err


def test_a_full_context_shows_what_is_extracted_and_counts_its_tokens(
    tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recall", tokenizer, "memory.max_context_tokens=40", "--reply", "Poland", "--tokens"]
    status, out, _ = _tried(capsys, words)
    assert status == 0 and "tokens and the next turn are over 40: the memory asks" in out
    lines = out.splitlines()
    cards = [json.loads(line) for line in lines if line.strip().startswith('[{"instruction')]
    assert len(cards) == 2 and sum("the environment's own 1 flashcard(s)" in line for line in lines) == 2
    assert out.count("--- a write would train 1 example(s)") == 2
    assert "392 tokens in 4 context(s), 2 extraction(s), 2 write(s)" in out
    assert "question that an extraction is shown: " in out
    sizes = [int(size) for size in re.findall(r"context: (\d+) of 40 tokens", out)]
    assert sizes and max(sizes) <= 40 and len(re.findall(r"context: \d+ tokens", out)) == 2
    # each token is printed once
    assert sum(line.count(":'") for line in lines if line.startswith("  1:'<|im_start|>'")) > 0
    printed = [piece for line in lines for piece in line.split() if piece.partition(":")[0].isdecimal()]
    assert len([piece for piece in printed if piece.partition(":")[2].startswith(("'", '"'))]) == 392


@pytest.mark.parametrize(
    ("setting", "title"),
    [
        ("memory.question_blind=true", "question, hidden from the extraction: "),
        ("memory.policy=truncation", "question: "),
    ],
)
def test_a_question_that_no_extraction_is_shown_is_not_said_to_be(
    setting: str, title: str, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recall", tokenizer, setting, "memory.max_context_tokens=40", "--reply", "Poland"]
    status, out, _ = _tried(capsys, words)
    question = next(line for line in out.splitlines() if line.startswith(title)).removeprefix(title)
    assert status == 0 and "an extraction is shown" not in out
    requests = out.split("request of the memory")[1:]
    assert not [request for request in requests if question in request.split("context:")[0]]


def test_typed_replies_come_from_the_standard_input_and_nothing_heavy_is_loaded(
    shop: int, tokenizer: str, tmp_path: Path
) -> None:
    script = (
        "import sys; from cluster.cli import main; status = main(); "
        "heavy = {'ray', 'vllm', 'deepspeed', 'mlflow'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(status)"
    )
    words = ["try", "my_shop:Shop", tokenizer]
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", script, *words],
        input="4\n5\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{root}:{tmp_path}", "HOME": str(tmp_path)},
        timeout=300,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "") and "reward 9 (sum 9)" in run.stdout


def test_the_first_interrupt_ends_typed_replies(shop: int, tokenizer: str) -> None:
    asked = []

    def typed(prompt: str) -> str:
        asked.append(prompt)
        signal.raise_signal(signal.SIGINT)
        return "1"

    settings = ["environment.name=custom", "environment.custom=my_shop:Shop", tokenizer]
    config = load_config(shipped()["quickstart"], settings)
    with pytest.raises(KeyboardInterrupt):
        try_task(config, Trial("train", 0, False), Replies(None, typed), Console())
    assert asked == ["reply 1"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["nowhere"], 2, "nowhere: no such file"),
        (["no_such_module:Shop"], 2, "there is no module no_such_module"),
        (["recall", "--reply", "a", "--replies", "b"], 2, "give one of them"),
        (["recall", "--replies", "/nowhere/b.txt"], 2, "/nowhere/b.txt cannot be read (No such file"),
        (["recall", "recall.sessions=2"], 2, "'recall.sessions' is no setting"),
        (["records", "environment.records.path=/nowhere/a.jsonl"], 1, "/nowhere/a.jsonl: cannot be read"),
        (["my_shop:Shop", "--task", "9", "--split", "dev"], 2, "'dev' is not one of 'train', 'eval'"),
    ],
)
def test_a_mistake_is_one_line(
    shop: int, tokenizer: str, words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*words[:1], tokenizer, *words[1:]]
    given, out, err = _tried(capsys, own)
    assert given == status and said in err and err.count("\n") == 1 and out == ""


def test_the_whole_window_is_the_limit_of_full_context_and_ones_own_memory_has_its_own(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "engine.max_model_tokens=1200",
        "sampling.max_answer_tokens=84",
        "memory.max_context_tokens=40",
    ]
    status, out, _ = _tried(
        capsys, ["recall", tokenizer, "memory.policy=full", *settings, "--reply", "Poland"]
    )
    assert (
        status == 0 and "memory full, a context is full at 1100 tokens (engine.max_model_tokens less" in out
    )
    assert "of 1100 tokens" in out and "L_max" not in out and "of 40 " not in out
    code = """
class Nothing:
    events = {}
    async def read(self, agent, text): agent.context.tell(agent.turn(text))
    async def answer(self, agent, text, max_tokens):
        agent.context.tell(agent.turn(text))
        return await agent.reply("act", max_tokens)

def build(memory, write, around): return Nothing()
"""
    (tmp_path / "my_memory.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_memory", raising=False)
    custom = ["memory.policy=custom", "memory.custom=my_memory:build", "--reply", "Poland"]
    status, out, _ = _tried(capsys, ["recall", tokenizer, *settings, *custom])
    assert status == 0 and "memory custom\n" in out and " of 40 " not in out and "L_max" not in out


_MEMORIES = """
class Fine:
    events = {}
    async def read(self, agent, text): agent.context.tell(agent.turn(text))
    async def answer(self, agent, text, max_tokens): return "Oslo"

class Sync(Fine):
    def read(self, agent, text): pass  # line 8

class Counting(Fine):
    events = None

def fine(memory, write, around): return Fine()
def sync(memory, write, around): return Sync()
def counting(memory, write, around): return Counting()
def raising(memory, write, around): return memory.options["tokens"]  # line 16
def none(memory, write, around): return None
def short(memory): return Fine()  # line 18
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sync", r"the memory Sync: TypeError: its read gave NoneType, it must be an async function \(my_"),
        ("counting", r"the memory Counting: AttributeError: 'NoneType' object has no attribute 'items'"),
        ("raising", r"memory\.custom=my_memories:raising: KeyError: 'tokens' \(my_memories\.py:16\)$"),
        (
            "none",
            r"memory\.custom=my_memories:none returned NoneType without events, read, answer: see",
        ),
        (
            "short",
            r"memory\.custom=my_memories:short: TypeError: short\(\) takes 1.*\(my_memories\.py:18\)$",
        ),
    ],
)
def test_a_memory_of_ones_own_that_is_broken_is_one_line_with_its_place(
    name: str,
    said: str,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my_memories.py").write_text(_MEMORIES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_memories", raising=False)
    words = ["memory.policy=custom", f"memory.custom=my_memories:{name}", "--reply", "Poland"]
    status, _, err = _tried(capsys, ["recall", tokenizer, *words])
    assert status == 1 and err.startswith("fault: ") and len(err.splitlines()) == 1
    assert re.search(said, err.strip()), err
