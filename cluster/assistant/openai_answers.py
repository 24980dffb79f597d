"""Answers of ``serve`` to chat completions: choices with calls and log-probs, whole or as they come.

The object ``engram`` of an answer is ours: which conversation, what was written, what was cut.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob

from actors.endpoint import answers
from actors.endpoint.answers import DONE, Chunks, SaidCall, SaidChoice, new_id
from actors.text.chat_template import ChatFormat
from actors.types import WriteRecord
from cluster.assistant.answering import Choice
from cluster.assistant.conversation import Reply
from cluster.assistant.openai_format import ChatRequest
from cluster.assistant.streaming import Stream

_WRITE_FIELDS = (
    "outcome", "reason", "revision", "steps", "seconds", "loss_before", "loss_after", "flashcards",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request brought. ``writes`` are all that it caused; ``new``: the conversation began with it.

    ``said`` are the choices as clients see them.
    """

    request: ChatRequest
    new: bool
    reply: Reply
    said: tuple[SaidChoice, ...]
    writes: tuple[WriteRecord, ...]

    @property
    def engram(self) -> dict[str, Any]:
        """Our addition to an answer. ``revision`` is that of the fast weights that answered."""
        request = self.request
        cut = {request.places.limit: {"asked": request.asked_tokens, "most": request.max_tokens}}
        return {
            "conversation": request.conversation,
            "new": self.new,
            "revision": self.reply.revision,
            "writes": [summarize(record) for record in self.writes],
            **({"limited": cut} if request.asked_tokens else {}),
        }


def said_choices(request: ChatRequest, reply: Reply, chat: ChatFormat) -> tuple[SaidChoice, ...]:
    """The choices of ``reply``, with the tool calls in them and what the request wants to know of them."""
    return tuple(_said(request, choice, chat) for choice in reply.choices)


def completion(model: str, answer: Answer) -> str:
    """The answer as JSON."""
    extra = {"engram": answer.engram}
    return answers.completion(model, answer.said, answers.usage(answer.reply), extra)


async def completion_events(model: str, request: ChatRequest, stream: Stream[Answer]) -> AsyncIterator[str]:
    """The answer as it comes, as server-sent events. One that fails half-way ends with an error."""
    chunks = Chunks(model, request.usage_in_stream)
    for index in range(request.manner.choices):
        yield chunks.begin(index, "")
    async for index, text in stream.pieces():
        yield chunks.text(index, text)
    answer = await stream.whole()
    for index, choice in enumerate(answer.said):
        if choice.calls:
            yield chunks.calls(index, choice.calls)
        yield chunks.end(index, choice, {"engram": answer.engram})
    if request.usage_in_stream:
        yield chunks.count(answers.usage(answer.reply))
    yield DONE


def summarize(record: WriteRecord) -> dict[str, Any]:
    """One write, for clients. In JSON the losses of a write that did not happen are null."""
    return {name: getattr(record, name) for name in _WRITE_FIELDS}


def _said(request: ChatRequest, choice: Choice, chat: ChatFormat) -> SaidChoice:
    calls = tuple(SaidCall.of(new_id("call"), call) for call in request.manner.calls_in(choice.text))
    logprobs = _logprobs(choice, chat) if request.logprobs else None
    return SaidChoice(choice.text, choice.finish_reason, calls, logprobs)


def _logprobs(choice: Choice, chat: ChatFormat) -> ChoiceLogprobs:
    """Those of every sampled token, of thoughts too, but not of the stop token or a stop text."""
    generation = choice.generation
    ids = generation.token_ids[: choice.told]
    ended = bool(ids) and ids[-1] in chat.stop_token_ids
    kept = len(ids) - ended
    top = choice.top or ((),) * len(ids)
    content = []
    for token_id, logprob, others in zip(ids[:kept], generation.logprobs, top, strict=False):
        token, told = chat.decode([token_id]), []
        for other, value in others:
            text = chat.decode([other])
            told.append(TopLogprob(token=text, logprob=value, bytes=_bytes(text)))
        content.append(
            ChatCompletionTokenLogprob(token=token, logprob=logprob, bytes=_bytes(token), top_logprobs=told)
        )
    return ChoiceLogprobs(content=content, refusal=None)


def _bytes(text: str) -> list[int] | None:
    """Null for a token that is a part of a character."""
    return None if "\ufffd" in text else list(text.encode())
