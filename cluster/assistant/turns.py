"""Answers a request in its conversation. A turn that fails, is late or is given up leaves nothing behind.

ChatRequest --> Sessions.turn --> its history, if it is new --> turns --> Answer
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from actors.endpoint.requests import RequestError, bad_value
from actors.protocols import EngineError, ReceiptError, WriterError
from actors.speech import RefusedError
from actors.text.chat_template import ChatTemplateError
from actors.text.tools import Tool
from cluster.assistant.answering import unheard
from cluster.assistant.conversation import Conversation
from cluster.assistant.known import Line
from cluster.assistant.metrics import Metrics
from cluster.assistant.openai_answers import Answer, said_choices
from cluster.assistant.openai_format import ChatRequest, replied
from cluster.assistant.opening import AssistantError, Parts
from cluster.assistant.saved import FullError
from cluster.assistant.sessions import BusyError, Sessions
from cluster.assistant.streaming import Hear

LEAST_ROOM = 16
"""Tokens of the context that a system message and tools must leave: else every turn would write."""

FAILURES = (BusyError, FullError, TimeoutError, AssistantError, EngineError, ReceiptError, WriterError)
"""What a turn may fail with, besides RequestError."""


async def answer(
    request: ChatRequest, parts: Parts, sessions: Sessions, metrics: Metrics, hear: Hear
) -> Answer:
    """Answer ``request`` by its deadline; ``hear`` gets the text as it comes.

    Raises RequestError and FAILURES: then the conversation is as it was before.
    """
    timer = metrics.timer()

    def heard(choice: int, text: str) -> None:
        timer.first_token()
        hear(choice, text)

    with timer:
        async with asyncio.timeout(parts.opening.config.assistant.request_timeout_s):
            turn = sessions.turn(request.conversation, request.system_prompt, request.history)
            async with turn as (conversation, new):
                answered = await _turn(request, parts, conversation, new, heard)
    metrics.answered(answered.reply, answered.writes)
    return answered


async def _turn(
    request: ChatRequest, parts: Parts, conversation: Conversation, new: bool, heard: Hear
) -> Answer:
    async with conversation.all_or_nothing():
        before = len(conversation.writes)
        _begin(conversation, request)
        may_return = parts.opening.config.assistant.edited_history == "return"
        start = await conversation.known.start(conversation, request.history, request.turns, may_return)
        for line in (*start.unread, *request.turns[:-1]):
            await _take_in(conversation, line)
        last = request.turns[-1]
        conversation.manner = replace(request.manner, heard=heard if request.stream else unheard)
        try:
            reply = await conversation.say(last.text, request.max_tokens, last.role)
        except RefusedError as error:
            raise bad_value(_one_line(error), None) from error
        said = said_choices(request, reply, parts.chat)
        heard_reply = replied(said[0].content or "", [(call.name, call.arguments) for call in said[0].calls])
        conversation.known.went_on(start, [*start.unread, *request.turns, heard_reply])
        return Answer(request, new, reply, said, conversation.writes[before:])


def _begin(conversation: Conversation, request: ChatRequest) -> None:
    """Raises RequestError where the request does not fit the conversation."""
    if request.system_prompt is not None and request.system_prompt != conversation.system_prompt.strip():
        message = "the conversation began with another system message: leave it out, or name a new one"
        raise RequestError(409, message, request.places.system, "history_conflict")
    if request.manner.decoding.json_schema and conversation.thinks:
        asked = request.places.schema
        message = f"{asked} cannot be kept by a model that thinks first: model.enable_thinking=false"
        raise bad_value(message, asked)
    conversation.temperature = request.temperature
    _tell_tools(conversation, request.tools)
    if conversation.room < LEAST_ROOM:
        message = (
            f"the system message and the tools leave {conversation.room} tokens of the context for turns, "
            f"{LEAST_ROOM} are needed: shorten them, or serve with a larger memory.max_context_tokens"
        )
        raise bad_value(message, request.places.system)


def _tell_tools(conversation: Conversation, tools: tuple[Tool, ...]) -> None:
    try:
        conversation.tell_tools(tools)
    except ChatTemplateError as error:
        raise bad_value(f"tools: {_one_line(error)}", "tools") from error


async def _take_in(conversation: Conversation, line: Line) -> None:
    if line.role == "assistant":
        await conversation.said(line.text)
    else:
        await conversation.read(line.text, line.role)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
