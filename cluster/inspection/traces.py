"""Kept episodes as MLflow traces of the run, made from their records and nothing else.

    EpisodeRecord --steps_of--> spans: observe, act, extract, write, receipt, answer, reward
    spans --a thread: start_trace, log_spans--> the experiment; metadata mlflow.sourceRun = the run

A trace is named by its task, and siblings of a step are one session. Rewards and scores are its assessments:
those of an answer stand at its span, with the gold answer as expectation. What the model read and said has
MLflow's chat form, with its tokens.

A store that is away costs traces, never the run. They are counted; their records stay in the run's folder.
A write has the seconds that its writer measured; what it waited for others comes before it. Of the other
phases only sums were measured, shared out over their tokens. The root span says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from actors.text.thoughts import visible_reply
from actors.types import Answer
from cluster.inspection.background import Background
from cluster.inspection.record import (
    EpisodeRecord,
    FailureRecord,
    Passage,
    Record,
    SegmentRecord,
    WriteEntry,
    file_name,
    plain,
)
from cluster.inspection.terminal import mark
from cluster.measure.rows import OUTCOMES
from cluster.tracking.sender import first_line, shown

if TYPE_CHECKING:
    from mlflow.entities import Assessment
    from mlflow.entities.span import Span
    from mlflow.tracing.client import TracingClient
    from opentelemetry.trace import SpanContext

_MOST_WAITING = 32
_LONGEST_PREVIEW = 500  # characters
_TIMES = (
    "a write's seconds were measured; those of other phases are shared out over their tokens: "
    "only their sums were measured"
)
_ROLES = {"system": "system", "assistant": "assistant", "act": "assistant", "extract": "assistant"}
_READ = ("system", "user", "assistant", "text")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """A span to be. ``kind``: MLflow's span type. ``inside``: spans at its end, beyond ``seconds``.

    ``wait``: seconds before it, in which the episode waited for others. ``answer``: what it assesses.
    """

    name: str
    kind: str
    inputs: Any
    outputs: Any
    seconds: float
    attributes: dict[str, Any] = field(default_factory=dict)
    inside: tuple[Step, ...] = ()
    error: str = ""
    wait: float = 0.0
    answer: Answer | None = None

    @property
    def length(self) -> float:
        return self.seconds + sum(step.wait + step.length for step in self.inside)


def steps_of(record: EpisodeRecord) -> tuple[Step, ...]:
    """List what happened in the episode, in order."""
    return (*_contexts(record, _Pace(record)), *_ending(record))


class _Pace:
    """Seconds of each phase for one of its units: a token, an install, a stretch that was read.

    ``wait``: before a write.
    """

    def __init__(self, record: EpisodeRecord) -> None:
        times = record.timings
        outcomes = [write.log.outcome for write in record.writes]
        reads = sum(read for segment in record.segments for read, _ in _stretches(segment))
        self.act = times.act / max(1, record.tokens_of("act"))
        self.extract = times.extract / max(1, record.tokens_of("extract"))
        written = [write.log.seconds for write in record.writes if write.log.outcome != "empty"]
        # A batch of writes may have taken longer than this episode was in it: then there was no wait.
        self.wait = max(0.0, times.write - sum(written)) / max(1, len(written))
        self.install = times.install / max(1, outcomes.count("accepted"))
        self.observe = max(0.0, times.environment) / max(1, reads)


def _stretches(segment: SegmentRecord) -> Iterator[tuple[bool, list[Passage]]]:
    """Group the passages read between two replies: (True, passages). A reply is (False, [reply])."""
    for read, passages in groupby(segment.passages, key=lambda passage: passage.kind in _READ):
        if read:
            yield True, list(passages)
        else:
            yield from ((False, [passage]) for passage in passages)


def _contexts(record: EpisodeRecord, pace: _Pace) -> Iterator[Step]:
    yield from _writes_after(record, -1, pace)
    for number, segment in enumerate(record.segments):
        for read, passages in _stretches(segment):
            tokens = sum(passage.tokens for passage in passages)
            about = {"context": number, "revision": segment.revision, "tokens": tokens}
            if read:
                turns = {"messages": [_message(turn) for turn in passages]}
                yield Step("observe", "UNKNOWN", None, turns, pace.observe, about)
            else:
                yield _reply(record, number, passages[0], pace, about)
        yield from _writes_after(record, number, pace)


def _reply(record: EpisodeRecord, number: int, passage: Passage, pace: _Pace, about: dict[str, Any]) -> Step:
    """A sampled passage: the context before it as messages, and what the model said."""
    segment = record.segments[number]
    before = [turn for turn in segment.passages if turn.end <= passage.start]
    inputs = {"messages": [_message(turn) for turn in before]}
    outputs: dict[str, Any] = {"choices": [{"message": _message(passage)}]}
    usage = {"input_tokens": passage.start, "output_tokens": passage.tokens, "total_tokens": passage.end}
    about = {**about, "mlflow.chat.tokenUsage": usage, "model": record.origin.model}
    if passage.kind == "act":
        return Step("act", "LLM", inputs, outputs, passage.tokens * pace.act, about)
    for write in record.writes:
        if write.after == number and write.log.extraction == visible_reply(passage.text):
            outputs |= {"flashcards": _cards(write), "unused": list(write.unused)}
    return Step("extract", "LLM", inputs, outputs, passage.tokens * pace.extract, about)


def _message(passage: Passage) -> dict[str, str]:
    return {"role": _ROLES.get(passage.kind, "user"), "content": passage.text}


def _writes_after(record: EpisodeRecord, number: int, pace: _Pace) -> Iterator[Step]:
    for write in record.writes:
        if write.after == number:
            yield _write(write, pace)


def _write(write: WriteEntry, pace: _Pace) -> Step:
    log = write.log
    outputs = {
        "outcome": log.outcome,
        "reason": log.reason,
        "loss_before": log.loss_before,
        "loss_after": log.loss_after,
        "revision": log.revision,
    }
    about = {
        "steps": log.steps,
        "writer_seconds": log.seconds,
        "examples": len(log.examples),
        "rejected": log.rejected_flashcards,
        "repaired": log.repaired_flashcards,
    }
    receipt = Step("receipt", "GUARDRAIL", None, {"receipt": write.receipt}, pace.install)
    return Step(
        "write",
        "MEMORY",
        {"flashcards": _cards(write)},
        outputs,
        0.0 if log.outcome == "empty" else log.seconds,
        about,
        () if write.receipt == "none" else (receipt,),
        error=(log.reason or log.outcome) if log.outcome == "rolled_back" else "",
        wait=0.0 if log.outcome == "empty" else pace.wait,
    )


def _cards(write: WriteEntry) -> list[dict[str, str]]:
    return [{"question": card.question, "answer": card.answer} for card in write.log.flashcards]


def _ending(record: EpisodeRecord) -> Iterator[Step]:
    for answer in record.outcome.answers:
        inputs = {"question": answer.question, "gold": list(answer.gold), "category": answer.category}
        outputs = {"prediction": answer.prediction, "scores": dict(answer.scores)}
        yield Step("answer", "EVALUATOR", inputs, outputs, 0.0, answer=answer)
    outcome = record.outcome
    reward = {
        "reward": outcome.reward,
        "parts": dict(outcome.reward_parts),
        "siblings": list(record.siblings),
    }
    yield Step("reward", "EVALUATOR", None, reward, 0.0)


class EpisodeTraces:
    """Sends the ``records`` that are submitted to the store. ``uri`` and ``run_id`` name the run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._store: tuple[TracingClient, str] | None = None  # opened with the first record
        self.records: Background[Record] = Background("mlflow-traces", self._send, first_line, _MOST_WAITING)

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` for the store. One line says what it did not take. The last call."""
        self.records.close(seconds)
        if self.records.lost:
            text = "warning: MLflow at %s did not take %d episode traces (%s): "
            text += "the records are in the run's folder"
            _log.warning(text, shown(self._uri), self.records.lost, self.records.problem)

    def _send(self, record: Record) -> None:
        if self._store is None:
            from mlflow.tracing.client import TracingClient
            from mlflow.tracking import MlflowClient

            run = MlflowClient(tracking_uri=self._uri).get_run(self._run_id)
            self._store = TracingClient(self._uri), str(run.info.experiment_id)
        send(*self._store, self._run_id, record)


def send(client: TracingClient, experiment: str, run_id: str, record: Record) -> None:
    """Send one trace. The same episode of the same run has the same id. Raises what MLflow raises."""
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    name = f"{run_id}/{file_name(record)}".encode()
    number = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    root = _root(record)
    began = record.ended - root.length
    spans = _spans(root, number, int(began * 1e9), None, 1)
    info = TraceInfo(
        trace_id=_trace_id(number),
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=int(began * 1000),
        state=TraceState.ERROR if root.error else TraceState.OK,
        request_preview=f"{record.task_id} ({record.episode_id})",
        response_preview=_preview(record)[:_LONGEST_PREVIEW],
        execution_duration=int(root.length * 1000),
        trace_metadata=_metadata(run_id, record),
        tags=_tags(record),
        assessments=list(_assessments(root, record, spans, _trace_id(number))),
    )
    client.start_trace(info)
    client.log_spans(experiment, spans)


def _metadata(run_id: str, record: Record) -> dict[str, str]:
    origin = record.origin
    session = f"{record.task_id}, {origin.label or 'train'}, step {origin.step}"
    metadata = {"mlflow.sourceRun": run_id, "mlflow.trace.session": session}
    if isinstance(record, EpisodeRecord):
        read, said = record.tokens - record.sampled_tokens, record.sampled_tokens
        usage = {"input_tokens": read, "output_tokens": said, "total_tokens": read + said}
        metadata["mlflow.trace.tokenUsage"] = json.dumps(usage)
    return metadata


def _tags(record: Record) -> dict[str, str]:
    origin = record.origin
    tags = {
        "mlflow.traceName": record.task_id,
        "engram.source": origin.source,
        "engram.step": str(origin.step),
        "engram.label": origin.label,
        "engram.memory": origin.memory,
        "engram.policy_version": str(record.policy_version),
    }
    if isinstance(record, EpisodeRecord):
        outcomes = [write.log.outcome for write in record.writes]
        tags |= {
            "engram.reward": f"{record.outcome.reward:.6g}",
            "engram.writes": "/".join(str(outcomes.count(name)) for name in OUTCOMES),
        }
    return {name: value for name, value in tags.items() if value}


def _assessments(root: Step, record: Record, spans: Sequence[Span], trace_id: str) -> Iterator[Assessment]:
    """The reward and mean scores of the episode, and the scores and the gold answer at each answer's span."""
    from mlflow.entities import AssessmentSource, Expectation, Feedback

    if isinstance(record, FailureRecord):
        return
    scorer = AssessmentSource(source_type="CODE", source_id=f"environment {record.environment}")
    values: dict[str, list[float]] = {"reward": [record.outcome.reward]}
    for answer in record.outcome.answers:
        for name, value in answer.scores.items():
            values.setdefault(name, []).append(value)
    for name, numbers in values.items():
        if math.isfinite(mean := sum(numbers) / len(numbers)):  # NaN has no place in the store
            yield Feedback(name=name, value=mean, source=scorer, trace_id=trace_id)
    answered = zip(_in_order(root), spans, strict=True)
    for answer, span in ((step.answer, span) for step, span in answered if step.answer is not None):
        at = {"source": scorer, "trace_id": trace_id, "span_id": span.span_id}
        yield Expectation(name="expected_response", value=" | ".join(answer.gold), **at)
        yield Feedback(
            name="answer", value=mark(answer.scores) or "no score", rationale=_scored(answer), **at
        )


def _scored(answer: Answer) -> str:
    scores = ", ".join(f"{name} {value:.3g}" for name, value in answer.scores.items())
    return f"{answer.prediction!r} ({scores})"


def _in_order(step: Step) -> Iterator[Step]:
    """As ``_spans`` makes them: each step before those inside it."""
    yield step
    for inner in step.inside:
        yield from _in_order(inner)


def _trace_id(number: int) -> str:
    return f"tr-{number:032x}"


def _preview(record: Record) -> str:
    if isinstance(record, FailureRecord):
        return f"{record.boundary}: {record.message}"
    answers = " | ".join(answer.prediction for answer in record.outcome.answers)
    return f"reward {record.outcome.reward:.3f}: {answers}"


def _root(record: Record) -> Step:
    origin, inputs = record.origin, {"task": record.task_id}
    about = {
        "task": record.task_id,
        "episode": record.episode_id,
        "policy_version": record.policy_version,
        "source": origin.source,
        "label": origin.label,
        "step": origin.step,
        "worker": origin.worker,
        "memory": origin.memory,
        "times": _TIMES,
    }
    if isinstance(record, FailureRecord):
        outputs: dict[str, Any] = {"failed": record.boundary, "message": record.message}
        return Step(
            record.task_id, "AGENT", inputs, outputs, 0.0, about, error=record.message or record.boundary
        )
    answers = [answer.prediction for answer in record.outcome.answers]
    outputs = {"reward": record.outcome.reward, "answers": answers, "stop_reason": record.stop_reason}
    about |= {"tokens": record.tokens}
    return Step(record.task_id, "AGENT", inputs, outputs, 0.0, about, steps_of(record))


def _spans(step: Step, trace: int, start: int, parent: SpanContext | None, first_id: int) -> list[Span]:
    """Make MLflow's spans of ``step`` and all inside it. ``start``: ns since 1970; ids from ``first_id``."""
    from mlflow.entities.span import Span
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, TraceFlags
    from opentelemetry.trace.status import Status, StatusCode

    values = {
        "mlflow.traceRequestId": _trace_id(trace),
        "mlflow.spanType": step.kind,
        "mlflow.spanInputs": step.inputs,
        "mlflow.spanOutputs": step.outputs,
        **step.attributes,
    }
    present = {key: value for key, value in values.items() if value is not None}
    context = SpanContext(trace, first_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    span = ReadableSpan(
        step.name,
        context,
        parent,
        Resource({}),
        {key: json.dumps(plain(value), ensure_ascii=False) for key, value in present.items()},
        status=Status(StatusCode.ERROR, step.error) if step.error else Status(StatusCode.OK),
        start_time=start,
        end_time=start + int(step.length * 1e9),
    )
    spans = [Span(span)]
    start += int(step.seconds * 1e9)
    for inner in step.inside:
        start += int(inner.wait * 1e9)
        spans += _spans(inner, trace, start, context, first_id + len(spans))
        start += int(inner.length * 1e9)
    return spans
