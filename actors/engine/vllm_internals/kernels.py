"""vLLM's CPU platform puts its own functions where Triton's kernels stand, when the first engine of a process starts.

It looks for them in everything that any imported module holds, and stumbles over objects that answer oddly when asked for their ``__dict__``:
llvmlite's handle of its library (numba, so bm25s) gives a C function, Flask's ``request`` (MLflow's server) raises. The engine then does not
start. Here is that search, without the stumbling.

Checked against vLLM 0.32 (vllm/triton_utils/dispatcher.py); tests/integration/test_engine.py starts an engine after both imports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


def search_with_care() -> None:
    """Before an engine starts: the stand-in for vLLM's own search. Again and again is the same as once."""
    from vllm.triton_utils import dispatcher

    if not callable(getattr(dispatcher, "_rebind_kernels", None)):
        raise RuntimeError(
            "vllm.triton_utils.dispatcher has no _rebind_kernels any more: actors/engine/vllm_internals/kernels.py is for vLLM 0.32"
        )
    dispatcher._rebind_kernels = rebind


def rebind(overrides: Sequence[tuple[Callable[..., Any], Any]]) -> None:
    """Each (kernel, what stands in for it): in the namespaces of all modules, and as the ``kernel`` of what they hold."""
    stand_ins = {id(kernel): stand_in for kernel, stand_in in overrides}
    for module in list(sys.modules.values()):
        for name, value in list(_namespace(module).items()):
            if id(value) in stand_ins:
                setattr(module, name, stand_ins[id(value)])
                continue
            kernel = _namespace(value).get("kernel")
            if kernel is not None and id(kernel) in stand_ins:
                value.kernel = stand_ins[id(kernel)]
                if not isinstance(value, type):
                    vars(value).pop("_kernel_arg_names", None)  # vLLM derives them again, from the stand-in


def _namespace(thing: object) -> Mapping[str, Any]:
    """Empty for what has none."""
    try:
        found = vars(thing)
    except Exception:  # noqa: BLE001  a proxy raises whatever it likes
        return {}
    return found if isinstance(found, dict | MappingProxyType) else {}
