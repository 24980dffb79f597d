"""Puts a run's recorder together: its folder, the model's chat format, and the traces of its MLflow run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.inspection.recorder import EpisodeRecorder, NoSink, chat_of, from_object_store
from cluster.inspection.traces import EpisodeTraces
from cluster.tracking.tracker import store_uri
from configs.schema import RunConfig

_WAIT_S, _TRACES_S = 30.0, 10.0
_STOPPED_WAIT_S = (
    2.0  # of a run that was told to stop, or failed: what is left of its grace time is not for this
)


@contextmanager
def recording(config: RunConfig, run_dir: Path, model_path: Path, run_id: str) -> Iterator[EpisodeRecorder]:
    """The recorder of a run for the duration of the block, at the end of which everything is written. ``run_id`` "": no traces."""
    wanted = config.episodes.traces and run_id
    traces = EpisodeTraces(store_uri(config.tracking, run_dir.parent), run_id) if wanted else None
    chat = chat_of(model_path)  # here: two threads that import transformers at once meet it half imported
    recorder = EpisodeRecorder(config.episodes, run_dir, chat, from_object_store, traces or NoSink())
    most = _WAIT_S
    try:
        yield recorder
    except BaseException:
        most = _STOPPED_WAIT_S
        raise
    finally:
        recorder.close(most)
        if traces is not None:
            traces.close(min(most, _TRACES_S, config.tracking.finish_timeout_s))
