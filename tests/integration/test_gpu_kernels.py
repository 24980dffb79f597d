"""vLLM's LoRA kernels for GPUs on Engram's slots: in Triton's interpreter, and the comparison itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.emulation import gpu_wrapper
from tests.gpu.kernels import ADAPTERS, BATCHES, SMALL, WrongDelta, check
from tests.gpu.parts import Report
from tests.gpu.stages import kernels

ROOT = Path(__file__).parents[2]
TRITON = Path(os.environ.get("ENGRAM_TRITON") or ROOT / ".triton")
pytestmark = pytest.mark.engine_in_process


def _checked(wrapper: type) -> dict[str, float]:
    return check(wrapper, torch.device("cpu"), torch.bfloat16, SMALL)


@pytest.mark.slow
@pytest.mark.skipif(
    not (TRITON / "triton").is_dir(), reason="Triton is not part of the CPU install: make triton"
)
def test_vllms_kernels_give_each_token_its_adapter_in_tritons_interpreter() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{TRITON}", "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.gpu.interpreted"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report.pop("triton")
    assert len(report) == 3 * len(BATCHES) and max(report.values()) > 0


def test_the_stage_of_the_smoke_test_compares_and_times_the_emulations_stand_in(tmp_path: Path) -> None:
    report: Report = {}
    kernels(tmp_path, report)
    assert report["kernels"] == "tests.gpu.emulation"
    assert sum(name.startswith(("small: ", "large: ")) for name in report) == 2 * 3 * len(BATCHES)
    assert report["adapters, decode: us"] > 0 and report["matmul, prefill: us"] > 0


class _Wrong:
    """The stand-in, with one thing wrong."""

    def __init__(self, *words: Any, **settings: Any) -> None:
        self._right = gpu_wrapper()(*words, **settings)

    def update_metadata(self, *words: Any) -> None:
        self._right.update_metadata(*words)

    def add_lora_linear(self, *words: Any) -> None:
        self._right.add_lora_linear(*words)


class _AnothersSlot(_Wrong):
    def update_metadata(self, mapping: Any, slots: list[int | None], *words: Any) -> None:
        swapped = {ADAPTERS[0]: ADAPTERS[1], ADAPTERS[1]: ADAPTERS[0]}
        self._right.update_metadata(mapping, [swapped.get(slot or 0, slot) for slot in slots], *words)


class _SlicesTheOtherWayRound(_Wrong):
    def add_lora_linear(self, y: Any, x: Any, a: Any, b: Any, scale: float, slices: Any) -> None:
        self._right.add_lora_linear(y, x, a[::-1], b[::-1], scale, slices[::-1])


class _ChangesBaseTokens(_Wrong):
    def add_lora_linear(self, y: Any, *words: Any) -> None:
        self._right.add_lora_linear(y, *words)
        y *= 1 + 2**-6


@pytest.mark.parametrize(
    ("wrapper", "says"),
    [
        (_AnothersSlot, "qkv, decode: an error of"),
        (_SlicesTheOtherWayRound, "qkv, decode: an error of"),
        (_ChangesBaseTokens, "qkv, decode: tokens without an adapter were changed"),
    ],
)
def test_a_wrong_slot_slice_or_base_token_is_found(wrapper: type, says: str) -> None:
    with pytest.raises(WrongDelta, match=says):
        _checked(wrapper)
