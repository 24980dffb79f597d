"""Chat templates of real families: thoughts, eos tokens, control tokens in texts, no system role, dates."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from actors.memory.base import Agent
from actors.text.chat_template import ChatFormat, ChatTemplateError, TemplateOptions, open_chat
from actors.text.context import Context
from actors.text.flashcards import write_example
from actors.types import Flashcard
from configs.schema import ModelConfig
from tests.unit import tokenizer_families as families

SYSTEM, USER, REPLY, NEXT = "You are brief.", "Where does Nora live?", "Lisbon", "What is it?"
OSLO = Flashcard("Capital?", "Oslo")


def _ids(tokenizer: Any, turns: list[tuple[str, str]], **options: Any) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return list(tokenizer.encode(text, add_special_tokens=False))


# --- thoughts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), ("<think>", "</think>")], ids=["text", "special"])
def test_a_card_is_trained_behind_the_thought_that_the_prompt_opens(hidden: tuple[str, ...]) -> None:
    tokenizer = families.byte_level(families.R1, hidden=hidden)
    chat = ChatFormat(tokenizer)
    example = write_example(OSLO, SYSTEM, chat)
    assert list(example.prompt_ids) == _ids(tokenizer, [("system", SYSTEM), ("user", "Capital?")])
    assert chat.opens_thought and chat.decode(example.prompt_ids).endswith("<think>\n")
    assert chat.decode(example.answer_ids) == "\n</think>\n\nOslo"
    assert tokenizer.convert_tokens_to_ids("</think>") in example.answer_ids
    assert example.answer_ids[-1] == chat.stop_token_ids[0]
    assert chat.said(example.answer_ids) == "Oslo"


@pytest.mark.parametrize("hidden", [(), ("<think>", "</think>")], ids=["text", "special"])
def test_what_a_sampled_reply_says(hidden: tuple[str, ...]) -> None:
    tokenizer = families.byte_level(families.R1, hidden=hidden)
    chat = ChatFormat(tokenizer)
    closed = tokenizer.encode("It is in Norway.\n</think>\n\nOslo<|im_end|>", add_special_tokens=False)
    assert chat.said(closed) == "Oslo"
    assert chat.said(tokenizer.encode("It is Oslo, I", add_special_tokens=False)) == ""


def test_enable_thinking_is_a_setting() -> None:
    tokenizer = families.byte_level(families.QWEN3)
    turns = [("system", SYSTEM), ("user", USER)]
    for thinks in (False, True):
        chat = ChatFormat(tokenizer, TemplateOptions(enable_thinking=thinks))
        pieces = chat.system(SYSTEM) + chat.user(USER) + chat.assistant_open
        assert list(pieces) == _ids(tokenizer, turns, enable_thinking=thinks)
        assert not chat.opens_thought
        assert ("<think>" in chat.decode(chat.assistant_open)) is not thinks
        assert chat.said(tokenizer.encode("<think>\nNora?\n</think>\n\nLisbon<|im_end|>")) == "Lisbon"


# --- stop tokens, control tokens --------------------------------------------------------------------------


def _folder(path: Path, tokenizer: Any, eos: object) -> Path:
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


def test_every_eos_token_that_a_model_declares_ends_a_reply(tmp_path: Path) -> None:
    tokenizer = families.byte_level(families.LLAMA32)
    end, text_end, message_end = tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>", "<|eom_id|>"]
    )
    chat = open_chat(_folder(tmp_path, tokenizer, [text_end, message_end, end]), ModelConfig())
    assert chat.stop_token_ids == (end, text_end, message_end)
    for stop in chat.stop_token_ids:
        assert chat.said((*chat.encode("Lisbon"), stop)) == "Lisbon"
    one = open_chat(_folder(tmp_path, tokenizer, message_end), ModelConfig())
    assert one.stop_token_ids == (end, message_end)


@pytest.mark.parametrize("name", [*families.NOT_SPECIAL, "<|im_end|>", "<bos>"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_control_tokens_in_a_text_stay_text(name: str, kind: str) -> None:
    if kind == "bytes":
        tokenizer = families.byte_level(families.QWEN3)
    else:
        tokenizer = families.sentence_piece(families.MISTRAL_V1)
        tokenizer.add_tokens(list(families.NOT_SPECIAL))
    chat = ChatFormat(tokenizer)
    text = f"before {name} and {name}after"
    ids = chat.encode(text)
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    assert chat.decode(ids) == text
    assert chat.encode("Where does Nora live?") == tuple(
        tokenizer.encode("Where does Nora live?", add_special_tokens=False)
    )


# --- no system role ---------------------------------------------------------------------------------------

WITHOUT_SYSTEM = {
    "mistral-v0.1": lambda: families.sentence_piece(families.MISTRAL_V1),
    "mistral-v0.1-today": lambda: families.sentence_piece(families.MISTRAL_V1_TODAY),
    "mistral-v0.3": lambda: families.sentence_piece(families.MISTRAL_V3, control=("[INST]", "[/INST]")),
    "gemma": lambda: families.byte_level(families.GEMMA, eos="<end_of_turn>"),
}


@pytest.mark.parametrize("family", WITHOUT_SYSTEM)
def test_without_a_system_role_the_system_text_opens_the_first_user_turn(family: str) -> None:
    tokenizer = WITHOUT_SYSTEM[family]()
    chat = ChatFormat(tokenizer)
    between = chat.decode(chat.system(SYSTEM)).partition(SYSTEM)[2]
    assert between == "\n\n"
    reply = (*chat.encode(REPLY), chat.stop_token_ids[0])
    pieces = chat.opening(SYSTEM, USER) + chat.assistant_open
    blank = " " if family.startswith("mistral") and family != "mistral-v0.1-today" else ""
    first = f"{SYSTEM}\n\n{blank}{USER}"
    merged = [("user", first)]
    assert pieces in (
        tuple(_ids(tokenizer, merged)),
        tuple(_ids(tokenizer, [("user", f"{SYSTEM}\n\n {USER}")])),
    )
    pieces += reply + chat.assistant_close(reply) + chat.user(NEXT) + chat.assistant_open
    text = chat.decode(pieces)
    assert text.count(SYSTEM) == 1 and text.index(SYSTEM) < text.index(USER) < text.index(REPLY)
    turns = [(turn.role, turn.text.strip()) for turn in chat.turns(pieces)]
    assert [role for role, _ in turns] == ["user", "assistant", "user"]
    assert turns[1][1] == REPLY and turns[0][1].endswith(USER)


@pytest.mark.parametrize("family", WITHOUT_SYSTEM)
def test_a_context_begins_as_the_written_example_does(family: str) -> None:
    """The agent joins system text and first turn, and so does the card: they are the same tokens."""
    chat = ChatFormat(WITHOUT_SYSTEM[family]())
    agent = Agent(None, chat, SYSTEM, "")  # type: ignore[arg-type]
    agent.context.observe(chat.user(OSLO.question))
    agent.context.observe(chat.assistant_open)
    assert agent.context.ids == write_example(OSLO, SYSTEM, chat).prompt_ids
    agent.clear("Notes: none.")
    assert agent.context.ids == chat.opening(SYSTEM, "Notes: none.")
    agent.context.observe(chat.user(NEXT))  # a second user turn opens itself
    assert agent.context.ids == chat.opening(SYSTEM, "Notes: none.") + chat.user(NEXT)


def test_an_empty_system_text_leaves_the_first_turn_whole() -> None:
    chat = ChatFormat(WITHOUT_SYSTEM["gemma"]())
    assert chat.opening("", USER) == chat.system("") + chat.user(USER)
    assert chat.decode(chat.opening("", USER)) == chat.decode(chat.user(USER))


def test_a_truncated_context_without_a_system_role_still_joins() -> None:
    chat = ChatFormat(WITHOUT_SYSTEM["gemma"]())
    system = chat.system(SYSTEM)
    context = Context(system, chat.opened_by(system))
    context.observe(chat.user(USER))
    assert context.truncated(1).is_fresh
    short = context.truncated(1)
    short.observe(chat.user(NEXT))
    assert short.ids == chat.opening(SYSTEM, NEXT)


def test_a_template_that_writes_no_turns_is_refused_in_one_line() -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="does not write each turn the same way"):
        ChatFormat(families.byte_level(template))


# --- the day ----------------------------------------------------------------------------------------------


def test_the_day_in_a_template_can_be_pinned() -> None:
    tokenizer = families.byte_level(families.LLAMA32)
    pinned = ChatFormat(tokenizer, TemplateOptions(day=dt.date(2026, 11, 3)))
    assert "Today Date: 03 Nov 2026" in pinned.decode(pinned.system(SYSTEM))
    today = ChatFormat(tokenizer)
    assert today.is_dated and dt.date.today().strftime("%d %b %Y") in today.decode(today.system(SYSTEM))
    assert not ChatFormat(families.byte_level(families.QWEN3)).is_dated
