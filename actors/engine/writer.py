"""The writer inside the rollout process, on the engine's own weights.

    episodes --write--> WriteBatcher --(one call for all that wait)--> EngineWriter
                                                                           |
    step thread: ... step, write, install, step ...  <--- StepLoop.call ---+

Writes run on the engine's step thread, between two steps. So engine and writer never compete for cores, no
lock guards the weights, and a refresh cannot come in the middle of a write.

    EngineWeights: vLLM's tensors --> FrozenLlama (no copy where vLLM shows a weight)
                   the layers under Delta, where vLLM packs weights away --> plain copies, from the checkpoint
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actors.engine.step_loop import StepLoop
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError
from actors.types import WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLayer, FrozenLlama, Linear, OwnedWeights, read_tensors
from actors.write.writer import BatchedWriter
from configs.schema import WriteConfig

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


WRITE_TIMEOUT_S = 900.0


class EngineWriter:
    """The FastWeightWriter of one engine, made by ``VLLMPolicy.writer``.

    ``write`` blocks its caller: not for an event loop's thread.
    """

    def __init__(
        self, loop: StepLoop[LLMEngine], weights: EngineWeights, basis: Basis, config: WriteConfig
    ) -> None:
        self._loop, self._weights, self._basis, self._config = loop, weights, basis, config
        self._built: tuple[FrozenLlama, BatchedWriter] | None = None

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """Write as BatchedWriter.write does, and raise what that raises.

        Raises EngineError when the engine is dead, or the write takes longer than ``WRITE_TIMEOUT_S``.
        """
        future = self._loop.call(lambda engine: self._attempt(requests), "write")
        try:
            results, error = future.result(WRITE_TIMEOUT_S)
        except FutureTimeoutError:
            raise EngineError(
                f"a write of {len(requests)} episodes did not end within {WRITE_TIMEOUT_S:.0f} s "
                "on the engine's step thread"
            ) from None
        if error is not None:
            raise error
        return results

    def _attempt(self, requests: Sequence[WriteRequest]) -> tuple[list[WriteResult], Exception | None]:
        """Run on the step thread. A write only reads the engine, so its errors must not end the thread."""
        try:
            return self._current().write(requests), None
        except Exception as error:  # noqa: BLE001  (handed to the caller, who raises it)
            return [], error

    def _current(self) -> BatchedWriter:
        """The writer over the present weights: a refresh makes another model."""
        if self._built is None or self._built[0] is not self._weights.model:
            self._built = (self._weights.model, BatchedWriter(self._weights.model, self._basis, self._config))
        return self._built[1]


class EngineWeights:
    """The engine's theta as a frozen llama, ``model``, for the step thread. A refresh makes a new ``model``.

    On a CPU vLLM packs the weights of its matmuls away. The lower layers then run vLLM's own matmuls. The
    layers that Delta touches need a gradient, so they get plain copies.
    """

    def __init__(self, vllm_model: Any, model_path: Path, basis: Basis) -> None:
        """Bind vLLM's tensors; read copies from ``model_path``, the same weights. Raises WriterError."""
        self._vllm_model, self._first = vllm_model, basis.first_layer
        self._owned: OwnedWeights | None = None
        self._copies: tuple[FrozenLayer, ...] = ()
        layers = vllm_model.model.layers
        if any(_weight(part) is None for layer in layers[self._first :] for part in _parts(layer)):
            numbers = range(self._first, len(layers))
            tensors = read_tensors(model_path, *(f"model.layers.{number}." for number in numbers))
            embed = vllm_model.model.embed_tokens.weight
            self._owned = owned = OwnedWeights(tensors, embed.dtype, embed.device)
            self._copies = tuple(owned.layer(number) for number in numbers)
        self.model = self._bind()

    def refresh(self, tensors: Mapping[str, Tensor]) -> None:
        """Follow vLLM, which has loaded ``tensors``: the plain copies get them too."""
        if self._owned is not None:
            self._owned.refresh(tensors)
        self.model = self._bind()

    def _bind(self) -> FrozenLlama:
        core = self._vllm_model.model
        shared = core.layers[: self._first] if self._copies else core.layers
        layers = (*(_layer(layer) for layer in shared), *self._copies)
        embed, norm, head = core.embed_tokens, core.norm, self._vllm_model.lm_head
        return FrozenLlama(
            self._vllm_model.config, embed.weight.data, layers, norm.weight.data, head.weight.data
        )


def _parts(layer: Any) -> tuple[Any, Any, Any, Any]:
    """The four linear modules of a vLLM layer, without the wrapper that adds an adapter."""
    parts = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    qkv, out, gate_up, down = (getattr(part, "base_layer", part) for part in parts)
    return qkv, out, gate_up, down


def _layer(layer: Any) -> FrozenLayer:
    qkv, out, gate_up, down = (_linear(part) for part in _parts(layer))
    return FrozenLayer(
        input_norm=layer.input_layernorm.weight.data,
        qkv=qkv,
        q_norm=_norm(layer.self_attn, "q_norm"),
        k_norm=_norm(layer.self_attn, "k_norm"),
        out=out,
        post_norm=layer.post_attention_layernorm.weight.data,
        gate_up=gate_up,
        down=down,
    )


def _linear(module: Any) -> Linear:
    bias = None if module.bias is None else module.bias.data
    return Linear(weight=_weight(module), bias=bias, forward=functools.partial(_vllm_matmul, module))


def _vllm_matmul(module: Any, x: Tensor) -> Tensor:
    product: Tensor = module.quant_method.apply(module, x, module.bias)
    return product


def _weight(module: Any) -> Tensor | None:
    """The module's matrix, or None where vLLM has packed it away."""
    weight: Tensor = module.weight.data
    return weight if weight.ndim == 2 and weight.numel() > 0 else None


def _norm(attention: Any, name: str) -> Tensor | None:
    module = getattr(attention, name, None)
    weight: Tensor | None = None if module is None else module.weight.data
    return weight
