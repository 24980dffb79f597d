"""OpenAI's older completions: a plain text is continued by the model as it is, without template or memory.

JSON --> _Body --> the prompt's tokens under revision 0 --> a text, whole or as it comes
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from actors.endpoint.answers import DONE, new_id
from actors.endpoint.requests import Text, bad_value, checked, only
from actors.episodes.episode import derived_seed
from actors.speech import RefusedError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Sampling
from cluster.assistant.answering import Choice, answers, unheard
from cluster.assistant.calling import Calling
from cluster.assistant.openai_format import Sampled, StreamOptions
from cluster.assistant.routes import Service
from cluster.assistant.streaming import Hear, Stream

Answered = tuple[int, tuple[Choice, ...]]
"""The prompt's tokens, and the replies."""


class _Body(Sampled):
    prompt: Annotated[
        Text,
        BeforeValidator(
            lambda prompt: prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        ),
    ] = Field(min_length=1, description="a text that is not empty")
    stream_options: StreamOptions | None = Field(None, description="an object")
    logprobs: int | None = Field(None, ge=0, le=20, description="a whole number, 0 to 20")
    conversation: Annotated[object, only()] = None
    echo: Annotated[object, only(False)] = None
    suffix: Annotated[object, only("")] = None
    best_of: Annotated[object, only(1)] = None


def add_completions(routes: APIRouter, service: Service) -> None:
    numbers = itertools.count()

    @routes.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = checked(_Body, await service.read(request))
        ids = service.parts.chat.continued(body.prompt)
        config = service.parts.opening.config
        if len(ids) >= config.engine.max_model_tokens - 1:
            most = config.engine.max_model_tokens - 2
            message = f"prompt has {len(ids)} tokens, at most {most} fit (engine.max_model_tokens)"
            raise bad_value(message, "prompt")
        # the same request again is another sample, unless it has a seed
        seed = derived_seed(config.seed, "completion", body.prompt, next(numbers))

        def work(hear: Hear) -> Coroutine[Any, Any, Answered]:
            return _answer(service, body, ids, seed, hear)

        stream = await service.begin(request, work, body.stream)
        form = _Form(service.name, body, service.parts.chat)
        if body.stream:
            return service.events(form.events(stream), stream)
        return Response(_json(form.whole(await stream.whole())), media_type="application/json")


async def _answer(service: Service, body: _Body, ids: Sequence[int], seed: int, hear: Hear) -> Answered:
    parts, config = service.parts, service.parts.opening.config
    limit = config.sampling.max_answer_tokens
    temperature = config.assistant.temperature if body.temperature is None else body.temperature
    sampling = Sampling(temperature, min(body.most_tokens or limit, limit), seed, "act")
    adapter = AdapterKey(parts.policy.version, "", 0)
    with service.metrics.timer() as timer:

        def heard(choice: int, text: str) -> None:
            timer.first_token()
            hear(choice, text)

        plain = Calling((), "", forced=False)
        manner = body.manner(plain, body.logprobs or 0, heard if body.stream else unheard)
        try:
            async with asyncio.timeout(config.assistant.request_timeout_s):
                choices = await answers(parts.policy, parts.chat.plainly, ids, sampling, adapter, manner)
        except RefusedError as error:
            raise bad_value(" ".join(str(error).split())[:500], None) from error
    service.metrics.counted(len(ids), _tokens(choices))
    return len(ids), choices


class _Form:
    """One answer in OpenAI's form."""

    def __init__(self, model: str, body: _Body, chat: ChatFormat) -> None:
        self._body, self._chat = body, chat
        created = int(time.time())
        self._head = {"id": new_id("cmpl"), "object": "text_completion", "created": created, "model": model}
        self._counts = body.stream_options is not None and bool(body.stream_options.include_usage)

    def whole(self, answered: Answered) -> dict[str, Any]:
        tokens, choices = answered
        told = [
            self._choice(index, choice.text, choice.finish_reason, choice)
            for index, choice in enumerate(choices)
        ]
        return self._head | {"choices": told, "usage": _usage(tokens, choices)}

    async def events(self, stream: Stream[Answered]) -> AsyncIterator[str]:
        """The answer as it comes."""
        async for index, text in stream.pieces():
            yield self._event([self._choice(index, text, None, None)])
        tokens, choices = await stream.whole()
        for index, choice in enumerate(choices):
            yield self._event([self._choice(index, "", choice.finish_reason, choice)])
        if self._counts:
            yield self._event([], usage=_usage(tokens, choices))
        yield DONE

    def _choice(self, index: int, text: str, reason: str | None, choice: Choice | None) -> dict[str, Any]:
        wanted = choice is not None and self._body.logprobs is not None
        logprobs = self._logprobs(choice) if choice and wanted else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        """By token; ``text_offset`` counts from the beginning of the reply."""
        ids = choice.generation.token_ids[: choice.told]
        ids = ids[:-1] if ids and ids[-1] in self._chat.stop_token_ids else ids
        tokens = [self._chat.decode([token_id]) for token_id in ids]
        offsets = [0]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        top = [{self._chat.decode([other]): value for other, value in likely} for likely in choice.top]
        return {
            "tokens": tokens,
            "token_logprobs": list(choice.generation.logprobs[: len(ids)]),
            "top_logprobs": top[: len(ids)],
            "text_offset": offsets[:-1],
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if self._counts else {}  # OpenAI's other events say that they count nothing
        return f"data: {_json(self._head | {'choices': choices} | usage | more)}\n\n"


def _tokens(choices: Sequence[Choice]) -> int:
    return sum(len(choice.generation.token_ids) for choice in choices)


def _usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    said = _tokens(choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": said, "total_tokens": prompt_tokens + said}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=True)
