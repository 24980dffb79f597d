"""Matches the history that a client resends to what was said, so that nothing is ever tokenised again.

    call 1   [system, user]                           -> new: user
    call 2   [system, user, assistant, user, user]    -> three are known; new: user, user

A client of the OpenAI protocol sends the whole conversation with every call. What is known stands in the
episode's context as it was sampled, or is in its memory already. Only the new turns are taken in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from actors.endpoint.answers import SaidCall
from actors.endpoint.requests import RequestError, Role, Text, bad_value


class _Function(BaseModel):
    name: str = Field(description="a text")
    arguments: str = Field(description="JSON in a text")


class _SentCall(BaseModel):
    id: str = Field(description="a text")
    function: _Function = Field(description="an object with name and arguments")


class Message(BaseModel):
    """One message of a call. Null is an empty text: an assistant may have said nothing, or called tools."""

    model_config = ConfigDict(strict=True, frozen=True)

    role: Literal[Role, "tool"] = Field(description="system, user, assistant or tool")
    content: Annotated[Text, BeforeValidator(lambda content: "" if content is None else content)] = Field(
        "", description="text"
    )
    tool_calls: list[_SentCall] | None = Field(None, description="the calls as they were answered")
    tool_call_id: str | None = Field(None, description="a text")

    @property
    def said(self) -> Said:
        """White space around a text is nothing that a template keeps."""
        if self.tool_calls:
            sent = [
                SaidCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ]
            return Said("assistant", _written(sent))
        role = "system" if self.role == "developer" else self.role
        return Said(role, self.content.strip(), self.tool_call_id or "")


@dataclass(frozen=True, slots=True)
class Said:
    """Who said what. ``call``: the tool call whose result it is."""

    role: str
    text: str
    call: str = ""


def _written(calls: Sequence[SaidCall]) -> str:
    return "\n".join(f"{call.id} {call.name} {_canonical(call.arguments)}" for call in calls)


def _canonical(arguments: str) -> str:
    """The same text for the same arguments: clients read them, and write them anew in a form of their own."""
    try:
        # all numbers as floats: JavaScript writes 3.0 as 3
        return json.dumps(json.loads(arguments, parse_int=float, parse_float=float), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


@dataclass(frozen=True, slots=True)
class NewTurns:
    """What a call adds. ``system_prompt`` is None but in the first call of a conversation that has one."""

    system_prompt: str | None
    turns: tuple[Said, ...]  # one or more; the last one is the user's or a tool's


class History:
    """What both sides have said in one conversation. It only grows."""

    def __init__(self) -> None:
        self._known: list[Said] = []
        self._open: tuple[SaidCall, ...] = ()  # tool calls of the newest reply

    def accept(self, messages: Sequence[Message]) -> NewTurns:
        """Take in the messages behind those that are known.

        Raises RequestError: 409 for an edited history or a second branch of it. Then nothing has changed.
        """
        said = [message.said for message in messages]
        for place, known in enumerate(self._known):
            if place == len(said) or said[place] != known:
                raise _conflict(place, place == len(said))
        start = len(self._known)
        system_prompt = said[0].text if not start and said[0].role == "system" else None
        start += system_prompt is not None
        for place, new in enumerate(said[start:], start):
            if new.role == "tool" and new.call not in {call.id for call in self._open}:
                raise _unasked(place)
            if new.role == "system":
                where = f"messages[{place}]"
                raise bad_value(f"{where}: a system message can only be the first", where)
            if new.role == "assistant" and messages[place].tool_calls:
                where = f"messages[{place}].tool_calls"
                raise bad_value(f"{where}: these calls were not sampled in this episode", where)
        if start == len(said) or said[-1].role == "assistant":
            raise bad_value("the last message must be the user's, or a tool's", "messages")
        self._known = said
        return NewTurns(system_prompt, tuple(said[start:]))

    def reply(self, text: str, calls: Sequence[SaidCall]) -> None:
        """Add what the policy has said to the newest call of the client."""
        self._open = tuple(calls)
        self._known.append(Said("assistant", _written(calls) if calls else text.strip()))


def _conflict(place: int, missing: bool) -> RequestError:
    where = f"messages[{place}]"
    what = "is missing" if missing else "is not what was said in this episode"
    cure = "send the whole conversation with every call, and only append to it"
    message = f"{where} {what}: an edited history, or a second branch of it, cannot be trained: {cure}"
    return RequestError(409, message, where, "history_conflict")


def _unasked(place: int) -> RequestError:
    where = f"messages[{place}].tool_call_id"
    return bad_value(f"{where} must be the id of a call in the newest reply", where)
