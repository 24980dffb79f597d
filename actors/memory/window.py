"""The smallest engine window in which a memory that extracts flashcards never fails for want of room.

    | a full context with an answer | memory-writing prompt, task's question | saved cards | new cards |
      L_max + answer                  counted by the tokenizer                 max_extract   max_extract

A text that is read adds nothing: it comes in pieces that fit, each behind a relief if need be
(actors/memory/parametric.py). A turn of more than L_max tokens that wants an answer may need more: then its
episode fails, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.memory.summary import rewrite_prompt
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import extraction_prompt
from actors.types import Flashcard
from configs.bounds import require
from configs.schema import RunConfig

_CARD = Flashcard("q", "a")  # so that the prompt has its line of saved cards


def require_window(config: RunConfig, chat: ChatFormat, questions: Sequence[str]) -> None:
    """Raise BoundError where the largest extraction does not fit ``engine.max_model_tokens``.

    ``questions``: those of the tasks, as far as they are known. Memories without flashcards always pass.
    """
    memory, window = config.memory, config.engine.max_model_tokens
    if memory.policy not in ("parametric", "hybrid") or config.write.epochs == 0:
        return
    asked = () if memory.question_blind else questions
    question = max(asked, key=lambda text: len(chat.encode(text)), default="")
    reply = len(chat.assistant_open) + len(chat.assistant_close(()))
    answer = config.sampling.max_answer_tokens + reply
    prompt = len(chat.user(extraction_prompt(question, [_CARD], memory.wordings))) + reply
    summary = 0
    if memory.policy == "hybrid":
        summary = memory.max_summary_tokens
        prompt += len(chat.user(rewrite_prompt(question))) + reply
    least = memory.max_context_tokens + answer + prompt + 2 * memory.max_extract_tokens + summary
    parts = [
        f"memory.max_context_tokens={memory.max_context_tokens}",
        f"{answer} for an answer",
        f"{prompt} for the memory-writing prompt",
        f"saved and new flashcards of memory.max_extract_tokens={memory.max_extract_tokens} each",
        *([f"memory.max_summary_tokens={summary}"] if summary else []),
    ]
    cure = "raise it, or lower the others"
    require(window >= least, "engine.max_model_tokens", window, f"{least} or more: {', '.join(parts)}", cure)
