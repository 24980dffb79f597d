"""First contact with a GPU: one stage after the other, each in a process of its own, one JSON line for each.

    python -m tests.gpu.smoke                   all stages; a failure is a line too, and the next stage runs
    python -m tests.gpu.smoke slots learner     some of them

    environment  kernels  writer  eager  graphs  learner  rl  slots

A random model of Qwen3-0.6B's shape is made first: no hub is needed. Without a GPU the same stages run on the
CPU with a tiny model, which shows only that they run. Eager comes before graphs: whether the adapters act is
known even where compiling fails. ``slots``, which only measures, comes last and takes what time is left. A
line with an "error" has the figures that were measured before it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tests.gpu.engine_stages import eager, graphs, slots
from tests.gpu.parts import Report, make_model
from tests.gpu.stages import ROOT, environment, kernels, learner, rl, writer

COMMAND = (sys.executable, "-m", "tests.gpu.smoke")
TOTAL_S = 600.0  # of all stages
STAGE_S = 240.0  # of one; vLLM compiles in some
LEAST_S = 10.0  # a stage that has less is not started
STAGES: Mapping[str, Callable[[Path, Report], None]] = {
    stage.__name__: stage for stage in (environment, kernels, writer, eager, graphs, learner, rl, slots)
}


def run_stage(name: str, folder: Path, limit_s: float = STAGE_S) -> Report:
    """Run a stage in a process of its own. Its report, with an "error" where it failed or took too long."""
    began = time.perf_counter()
    command = [*COMMAND, "--here", name, str(folder)]
    # A file, not a pipe: what a stage has started may outlive it and hold a pipe open.
    output, errors = folder / f"{name}.json", folder / f"{name}.log"
    output.unlink(missing_ok=True)
    with errors.open("w") as log:
        process = subprocess.Popen(
            [*command, str(output)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        late = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
        _end(process)
    report: Report = json.loads(output.read_text()) if output.exists() else {}
    if late or process.returncode < 0 or not output.exists():
        why = f"not done within {limit_s:.0f} s" if late else f"ended with {process.returncode}"
        report["error"] = f"{why}: {errors.read_text(errors='replace')[-2000:]}"
    return {"stage": name, "seconds": round(time.perf_counter() - began, 1), **report}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage, which writes what it has measured, and all that it has started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_here(name: str, folder: Path, output: Path) -> None:
    """Run a stage in this process, write its report to ``output``, and end the process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report: Report = {}
    try:
        STAGES[name](folder, report)
    except BaseException as error:
        traceback.print_exc()
        report["error"] = f"{type(error).__name__}: {error}"
    output.write_text(json.dumps(report))
    sys.stderr.flush()
    os._exit(0)  # without waiting for vLLM's threads


def main(words: list[str]) -> int:
    if words[:1] == ["--here"]:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
        run_here(words[1], Path(words[2]), Path(words[3]))
    if unknown := set(words) - set(STAGES):
        print(f"no stage {min(unknown)}; there are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        make_model(Path(folder))
        began = time.perf_counter()
        for name in words or STAGES:
            left = TOTAL_S - (time.perf_counter() - began)
            if left < LEAST_S:
                report: Report = {"stage": name, "error": f"not started: the {TOTAL_S:.0f} s are over"}
            else:
                report = run_stage(name, Path(folder), min(STAGE_S, left))
            print(json.dumps(report), flush=True)
            failed += "error" in report
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
