"""Runs vLLM's LoRA kernels in Triton's interpreter on a CPU, and prints a JSON line.

    make triton                                                        Triton, in a folder of its own
    PYTHONPATH=.triton TRITON_INTERPRET=1 python -m tests.gpu.interpreted

Triton is no part of the CPU install: it has 700 MB, and vLLM for CPUs takes other paths where it is there.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace


def let_vllm_take_triton() -> None:
    """Have vLLM for CPUs import its GPU kernels: it asks for a driver of Triton's, and that it is active."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("set TRITON_INTERPRET=1: there is no GPU to compile for", file=sys.stderr)
        return 2
    let_vllm_take_triton()
    import torch
    import triton
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    from tests.gpu.kernels import SMALL, check

    # float16: the interpreter multiplies the bit patterns of bfloat16 as integers.
    errors = check(PunicaWrapperGPU, torch.device("cpu"), torch.float16, SMALL)
    print(json.dumps({"triton": triton.__version__, **errors}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
