"""Mends the search by which vLLM's CPU platform puts its own functions in the place of Triton's kernels.

vLLM does that when the first engine of a process starts. It looks for kernels in everything that any imported
module holds.

Why: the search stumbles over objects that answer oddly when asked for their ``__dict__``: llvmlite's handle
of its library (numba, so bm25s) gives a C function, Flask's ``request`` (MLflow's server) raises. The engine
then does not start. Here is the same search, without the stumbling.

Checked on vLLM 0.32 (vllm/triton_utils/dispatcher.py). test_engine_stand_ins.py fails when vLLM changes: it
starts an engine after both imports (test_the_engine_starts_after_modules_that_answer_oddly).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


def search_with_care() -> None:
    """Put ``rebind`` in the place of vLLM's search. Call it before an engine starts; safe to call twice."""
    from vllm.triton_utils import dispatcher

    if not callable(getattr(dispatcher, "_rebind_kernels", None)):
        raise RuntimeError(
            "vllm.triton_utils.dispatcher has no _rebind_kernels any more: "
            "actors/engine/vllm_internals/kernels.py is for vLLM 0.32"
        )
    dispatcher._rebind_kernels = rebind


def rebind(overrides: Sequence[tuple[Callable[..., Any], Any]]) -> None:
    """Put each kernel's stand-in into the namespaces of all modules, and into what holds it as ``kernel``.

    ``overrides``: pairs of a kernel and its stand-in.
    """
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
    """The attributes of ``thing``; empty for a thing that has none, or gives none."""
    try:
        attributes = vars(thing)
    except Exception:  # noqa: BLE001  (a proxy may raise anything)
        return {}
    return attributes if isinstance(attributes, dict | MappingProxyType) else {}
