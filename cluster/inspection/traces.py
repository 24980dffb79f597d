"""Kept episodes as MLflow traces of the run: observe, act, extract, write, receipt, answer and reward, made from the record and nothing else.

    EpisodeRecord --steps_of--> spans --a thread: start_trace, log_spans--> the experiment, trace metadata mlflow.sourceRun = the run

A store that is away costs traces (they are counted; the records stay in the run's folder), never the run. An episode knows how long each of its
phases took, not when: a phase's seconds are shared out over its spans, in order, and the root span says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.inspection.record import (
    EpisodeRecord,
    FailureRecord,
    Passage,
    Record,
    WriteEntry,
    file_name,
    plain,
)
from cluster.tracking.sender import first_line, shown

_MOST_WAITING = 32
_TIMES = "the seconds of a phase are shared out over its spans: only their sums were measured"
_READ = ("system", "user", "assistant", "text")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """One span to be. ``seconds``: its length. ``inside``: spans within it, at its end."""

    name: str
    kind: str  # MLflow's span type
    inputs: Any
    outputs: Any
    seconds: float
    attributes: dict[str, Any] = field(default_factory=dict)
    inside: tuple[Step, ...] = ()


def steps_of(record: Record) -> tuple[Step, ...]:
    """What happened in the episode, in order."""
    if isinstance(record, FailureRecord):
        return ()
    return (*_told(record, _Pace(record)), *_ending(record))


class _Pace:
    """Seconds of each phase by the unit that it is shared out over."""

    def __init__(self, record: EpisodeRecord) -> None:
        sampled = dict.fromkeys(("act", "extract"), 0)
        observed = 0
        for segment in record.segments:
            for kind in sampled:
                sampled[kind] += sum(
                    passage.end - passage.start for passage in segment.passages if passage.kind == kind
                )
            observed += sum(1 for _ in _stretches(segment.passages))
        written = [write for write in record.writes if write.log.outcome != "empty"]
        times = record.timings
        self.token = {
            "act": times.act / max(1, sampled["act"]),
            "extract": times.extract / max(1, sampled["extract"]),
        }
        self.write = times.write / max(1, len(written))
        self.install = times.install / max(1, sum(write.log.outcome == "accepted" for write in written))
        self.observe = max(0.0, times.environment) / max(1, observed)


def _stretches(passages: tuple[Passage, ...]) -> Iterator[list[Passage]]:
    """What was read between two replies, as one."""
    run: list[Passage] = []
    for passage in passages:
        if passage.kind in _READ:
            run.append(passage)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _told(record: EpisodeRecord, pace: _Pace) -> Iterator[Step]:
    yield from _behind(record, -1, pace)
    for number, segment in enumerate(record.segments):
        where = {"context": number, "revision": segment.revision}
        read: list[Passage] = []
        for passage in (*segment.passages, None):
            if passage is not None and passage.kind in _READ:
                read.append(passage)
                continue
            if read:
                turns = [{"role": turn.kind, "text": turn.text} for turn in read]
                tokens = sum(turn.end - turn.start for turn in read)
                yield Step("observe", "UNKNOWN", None, turns, pace.observe, {**where, "tokens": tokens})
                read = []
            if passage is not None:
                yield _said(record, number, passage, where, pace)
        yield from _behind(record, number, pace)


def _said(record: EpisodeRecord, number: int, passage: Passage, where: dict[str, Any], pace: _Pace) -> Step:
    tokens = passage.end - passage.start
    outputs: dict[str, Any] = {"text": passage.text}
    if passage.kind == "extract":
        for write in (
            write for write in record.writes if write.after == number and write.log.extraction == passage.text
        ):
            outputs["flashcards"] = [
                {"question": card.question, "answer": card.answer} for card in write.log.flashcards
            ]
            outputs["unused"] = list(write.unused)
    return Step(
        passage.kind, "LLM", None, outputs, tokens * pace.token[passage.kind], {**where, "tokens": tokens}
    )


def _behind(record: EpisodeRecord, number: int, pace: _Pace) -> Iterator[Step]:
    for write in record.writes:
        if write.after == number:
            yield _written(write, pace)


def _written(write: WriteEntry, pace: _Pace) -> Step:
    log = write.log
    cards = [{"question": card.question, "answer": card.answer} for card in log.flashcards]
    outputs = {
        "outcome": log.outcome,
        "reason": log.reason,
        "loss_before": log.loss_before,
        "loss_after": log.loss_after,
        "revision": log.revision,
    }
    measured = {
        "steps": log.steps,
        "writer_seconds": log.seconds,
        "examples": len(log.examples),
        "rejected": log.rejected_flashcards,
    }
    receipt = Step("receipt", "GUARDRAIL", None, {"receipt": write.receipt}, pace.install)
    inside = () if write.receipt == "none" else (receipt,)
    return Step(
        "write",
        "MEMORY",
        {"flashcards": cards},
        outputs,
        0.0 if log.outcome == "empty" else pace.write,
        measured,
        inside,
    )


def _ending(record: EpisodeRecord) -> Iterator[Step]:
    for answer in record.outcome.answers:
        inputs = {"question": answer.question, "gold": list(answer.gold), "category": answer.category}
        yield Step(
            "answer",
            "EVALUATOR",
            inputs,
            {"prediction": answer.prediction, "scores": dict(answer.scores)},
            0.0,
        )
    parts = {"parts": dict(record.outcome.reward_parts), "siblings": list(record.siblings)}
    yield Step("reward", "EVALUATOR", None, {"reward": record.outcome.reward, **parts}, 0.0)


class EpisodeTraces:
    """Sends records to the store from its own thread, opened with the first one. ``uri`` and ``run_id`` name the run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._records: queue.Queue[Record | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="mlflow-traces", daemon=True)
        self._problem = ""
        self.sent = 0
        self.dropped = 0

    def add(self, record: Record) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._drop("it is slow")

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` for the store; say in one line what it did not take."""
        if self._thread.is_alive():
            left = self._records.qsize()
            try:
                self._records.put(None, timeout=seconds)
                self._thread.join(seconds)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self.dropped += left
        if self.dropped:
            why = self._problem or "it does not answer"
            _log.warning(
                "warning: MLflow at %s did not take %d episode traces (%s): the records are in the run's folder",
                shown(self._uri),
                self.dropped,
                why,
            )

    def _run(self) -> None:
        experiment = ""
        client: Any = None
        while (record := self._records.get()) is not None:
            try:
                if client is None:
                    from mlflow.tracing.client import TracingClient
                    from mlflow.tracking import MlflowClient

                    experiment = str(
                        MlflowClient(tracking_uri=self._uri).get_run(self._run_id).info.experiment_id
                    )
                    client = TracingClient(self._uri)
                send(client, experiment, self._run_id, record)
                self.sent += 1
            except Exception as error:  # noqa: BLE001  whatever the store, its driver or its HTTP client raise: a trace is lost, not the run
                self._drop(first_line(error))

    def _drop(self, problem: str) -> None:
        self.dropped += 1
        self._problem = self._problem or problem


def send(client: Any, experiment: str, run_id: str, record: Record) -> str:
    """One trace by ``client`` (a TracingClient); its id, the same for the same episode of the same run. Raises what MLflow raises."""
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    number = int.from_bytes(
        hashlib.blake2b(f"{run_id}/{file_name(record)}".encode(), digest_size=16).digest(), "big"
    )
    root = _root(record)
    spans = _spans(root, number, int((record.ended - root.seconds) * 1e9))
    failed = isinstance(record, FailureRecord)
    info = TraceInfo(
        trace_id=f"tr-{number:032x}",
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=int((record.ended - root.seconds) * 1000),
        state=TraceState.ERROR if failed else TraceState.OK,
        request_preview=f"{record.task_id} ({record.episode_id})",
        response_preview=_preview(record),
        execution_duration=int(root.seconds * 1000),
        trace_metadata={"mlflow.sourceRun": run_id},
        tags={
            "mlflow.traceName": "episode",
            "engram.source": record.origin.source,
            "engram.step": str(record.origin.step),
        },
    )
    client.start_trace(info)
    client.log_spans(experiment, spans)
    return info.trace_id


def _preview(record: Record) -> str:
    if isinstance(record, FailureRecord):
        return f"{record.boundary}: {record.message}"[:500]
    return f"reward {record.outcome.reward:.3f}: {' | '.join(answer.prediction for answer in record.outcome.answers)}"[
        :500
    ]


def _root(record: Record) -> Step:
    origin = record.origin
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
        return Step(
            "episode",
            "AGENT",
            {"task": record.task_id},
            {"failed": record.boundary, "message": record.message},
            0.0,
            about,
        )
    steps = steps_of(record)
    answers = [answer.prediction for answer in record.outcome.answers]
    outputs = {"reward": record.outcome.reward, "answers": answers, "stop_reason": record.stop_reason}
    seconds = sum(_length(step) for step in steps)
    return Step(
        "episode",
        "AGENT",
        {"task": record.task_id},
        outputs,
        seconds,
        about | {"tokens": record.tokens},
        steps,
    )


def _length(step: Step) -> float:
    return step.seconds + (0.0 if step.name == "episode" else sum(_length(inner) for inner in step.inside))


def _spans(root: Step, trace: int, start: int) -> list[Any]:
    """MLflow spans (nanoseconds since 1970) of ``root`` and all within it, one after the other."""
    from mlflow.entities.span import Span
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, TraceFlags
    from opentelemetry.trace.status import Status, StatusCode

    resource, made = Resource({}), list[Any]()

    def add(step: Step, began: int, parent: SpanContext | None) -> int:
        context = SpanContext(
            trace, len(made) + 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )
        ended = began + int(_length(step) * 1e9)
        values = {
            "mlflow.traceRequestId": f"tr-{trace:032x}",
            "mlflow.spanType": step.kind,
            "mlflow.spanInputs": step.inputs,
        }
        values |= {"mlflow.spanOutputs": step.outputs, **step.attributes}
        attributes = {
            key: json.dumps(plain(value), ensure_ascii=False)
            for key, value in values.items()
            if value is not None
        }
        failed = isinstance(step.outputs, dict) and (
            step.outputs.get("outcome") == "rolled_back" or "failed" in step.outputs
        )
        status = (
            Status(StatusCode.ERROR, str(step.outputs.get("reason") or step.outputs.get("message")))
            if failed
            else Status(StatusCode.OK)
        )
        span = ReadableSpan(
            step.name, context, parent, resource, attributes, status=status, start_time=began, end_time=ended
        )
        made.append(Span(span))
        place = began if step is root else began + int(step.seconds * 1e9)
        for inner in step.inside:
            place = add(inner, place, context)
        return ended

    add(root, start, None)
    return made
