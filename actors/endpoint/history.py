"""Matches the history that a client resends to what was said, so that nothing is ever tokenised again.

    call 1   [system, user]                           -> new: user
    call 2   [system, user, assistant, user, user]    -> three are known; new: user, user

A client of the OpenAI protocol sends the whole conversation with every call. What is known stands in the
episode's context as it was sampled, or is in its memory already. Only the new turns are taken in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from actors.endpoint.requests import RequestError, Role, Text, bad_value, only


class Message(BaseModel):
    """One message of a call. Null is an empty text: an assistant may have said nothing."""

    model_config = ConfigDict(strict=True, frozen=True)

    role: Role = Field(description="system, user or assistant: tools are not supported here")
    content: Annotated[Text, BeforeValidator(lambda content: "" if content is None else content)] = Field(
        "", description="text"
    )
    tool_calls: Annotated[object, only([])] = None

    @property
    def said(self) -> tuple[str, str]:
        """Who says what. White space around a text is nothing that a template keeps."""
        return "system" if self.role == "developer" else self.role, self.content.strip()


@dataclass(frozen=True, slots=True)
class NewTurns:
    """What a call adds. ``system_prompt`` is None but in the first call of a conversation that has one."""

    system_prompt: str | None
    turns: tuple[str, ...]  # the user's, one or more


class History:
    """What both sides have said in one conversation. It only grows."""

    def __init__(self) -> None:
        self._known: list[tuple[str, str]] = []

    def accept(self, messages: Sequence[Message]) -> NewTurns:
        """Take in the messages behind those that are known.

        Raises RequestError: 409 for an edited history or a second branch of it. Then nothing has changed.
        """
        said = [message.said for message in messages]
        for place, known in enumerate(self._known):
            if place == len(said) or said[place] != known:
                raise _conflict(place, place == len(said))
        start = len(self._known)
        system_prompt = said[0][1] if not start and said[0][0] == "system" else None
        start += system_prompt is not None
        for place, (role, _) in enumerate(said[start:], start):
            if role != "user":
                raise _foreign(place, role)
        if start == len(said):
            raise bad_value("the last message must be the user's", "messages")
        self._known = said
        return NewTurns(system_prompt, tuple(text for _, text in said[start:]))

    def reply(self, text: str) -> None:
        """Add what the policy has said to the newest call."""
        self._known.append(("assistant", text.strip()))


def _conflict(place: int, missing: bool) -> RequestError:
    where = f"messages[{place}]"
    what = "is missing" if missing else "is not what was said in this episode"
    cure = "send the whole conversation with every call, and only append to it"
    message = f"{where} {what}: an edited history, or a second branch of it, cannot be trained: {cure}"
    return RequestError(409, message, where, "history_conflict")


def _foreign(place: int, role: str) -> RequestError:
    where = f"messages[{place}]"
    if role == "system":
        return bad_value(f"{where}: a system message can only be the first", where)
    cure = "put examples into the system or the user message"
    return bad_value(f"{where}: this reply was not sampled in this episode: {cure}", where)
