"""What a client hears of a reply: vLLM's own output processor and our step loop, before a list of tokens."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists

from actors.engine.sampling import Outputs, parameters
from actors.engine.step_loop import StepLoop
from actors.speech import Decoding, RefusedError, Spoken
from actors.types import Sampling

SAMPLING = Sampling(0.7, 16, 5, "act")
TOKENS = (11, 12, 13, 14)


class Typist:
    """An engine that gives one token of TOKENS a step, with the log-probs -0.1, -0.2, ...

    The runner-up is 99. ``masked``: nothing else may be said, so its log-prob is -inf.
    """

    def __init__(self, masked: bool = False) -> None:
        self.aborted: list[str] = []
        self._other = float("-inf") if masked else -5.0
        self._said: dict[str, int] = {}
        self._processor = OutputProcessor(None, log_stats=False)

    def add(self, name: str, parameters: SamplingParams) -> None:
        request = EngineCoreRequest(
            name, [1, 2], None, parameters, None, 0.0, None, None, None, external_req_id=name
        )
        self._processor.add_request(request, None)
        self._said[name] = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self._said)

    def step(self) -> Sequence[Any]:
        outputs = []
        for name, place in [*self._said.items()]:
            token, value = TOKENS[place], -0.1 * (place + 1)
            told = LogprobsLists(
                np.array([[token, token, 99]]), np.array([[value, value, self._other]]), np.array([1])
            )
            ended = place == len(TOKENS) - 1
            outputs.append(
                EngineCoreOutput(
                    name, [token], new_logprobs=told, finish_reason=FinishReason.STOP if ended else None
                )
            )
            self._said[name] += 1
            if ended:
                del self._said[name]
        return self._processor.process_outputs(outputs).request_outputs

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self._said.pop(name, None)
            self.aborted.append(name)


async def speak(engine: Typist, heard: list[tuple[int, ...]], end_after: int = 99) -> Spoken:
    loop: StepLoop[Typist] = StepLoop("the engine", lambda: engine, lambda _: None, start_timeout_s=30)
    asked = parameters(SAMPLING, Decoding(top_logprobs=2), (14,), as_it_comes=True)

    def hear(ids: Sequence[int]) -> bool:
        heard.append(tuple(ids))
        return len(ids) >= end_after

    try:
        outputs = Outputs()
        done = loop.request("a", "x", "act", 2, lambda e: e.add("a", asked), outputs.put)
        return await outputs.listen(done, hear)
    finally:
        await asyncio.sleep(0)  # so that a cancelled wait reaches the step loop
        loop.call(lambda e: None, "other").result(30)  # what was to be aborted is
        loop.close(30)


def test_every_step_is_heard_and_the_whole_comes_at_the_end() -> None:
    heard: list[tuple[int, ...]] = []
    spoken = asyncio.run(speak(Typist(), heard))
    assert heard == [TOKENS[:1], TOKENS[:2], TOKENS[:3], TOKENS]
    generation = spoken.generation
    assert (generation.token_ids, generation.finish_reason) == (TOKENS, "stop")
    assert generation.logprobs == pytest.approx((-0.1, -0.2, -0.3, -0.4))
    assert spoken.top[1] == ((12, pytest.approx(-0.2)), (99, -5.0))


def test_what_a_mask_leaves_out_has_a_log_prob_that_json_can_hold() -> None:
    spoken = asyncio.run(speak(Typist(masked=True), []))
    assert [likely[1] for likely in spoken.top] == [(99, -9999.0)] * len(TOKENS)
    json.dumps(spoken.top, allow_nan=False)


def test_a_listener_that_has_heard_enough_ends_the_request() -> None:
    engine, heard = Typist(), list[tuple[int, ...]]()
    spoken = asyncio.run(speak(engine, heard, end_after=2))
    assert (spoken.generation.token_ids, spoken.generation.finish_reason) == (TOKENS[:2], "stop")
    assert len(spoken.top) == 2 and heard == [TOKENS[:1], TOKENS[:2]]


def test_a_listener_that_is_cancelled_aborts_the_request() -> None:
    class Endless(Typist):
        def step(self) -> Sequence[Any]:
            began.set()
            return []

    async def story() -> None:
        task = asyncio.create_task(speak(engine, []))
        await asyncio.to_thread(began.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    engine, began = Endless(), threading.Event()
    asyncio.run(story())
    assert engine.aborted == ["a"]


def test_every_setting_reaches_vllm() -> None:
    asked = Decoding(0.5, 7, 0.1, 0.2, 0.3, 1.2, ((17, -100.0),), 3, '{"type": "object"}')
    given = parameters(SAMPLING, asked, (14,))
    assert (given.temperature, given.max_tokens, given.seed) == (0.7, 16, 5)
    assert (given.top_p, given.top_k, given.min_p) == (0.5, 7, 0.1)
    penalties = (given.presence_penalty, given.frequency_penalty, given.repetition_penalty)
    assert penalties == (0.2, 0.3, 1.2)
    assert (given.logit_bias, given.logprobs, given.stop_token_ids) == ({17: -100.0}, 3, [14])
    assert given.structured_outputs is not None and given.structured_outputs.json == '{"type": "object"}'
    with pytest.raises(RefusedError, match="vLLM refuses"):
        parameters(SAMPLING, Decoding(top_p=2.0), ())
