"""A frozen causal LM as plain tensors, for passes that neither the engine nor a Hugging Face module makes.

    weights: a checkpoint's, or vLLM's own (engine/writer.py) --> FrozenLlama: embed, layers, norm, head
    pattern: who attends to whom in a stream (flat_batch.py)  -->   attention, MLP, head of that stream

A decoder layer is h += attention(norm(h)); h += mlp(norm(h)): Llama, Mistral, Qwen2, Qwen3. No weight gets a
gradient; the gradient of the stream is exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from actors.protocols import WriterError
from actors.write.flat_batch import FlatBatch

SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")


class _TimesFrozen(torch.autograd.Function):
    """x W^T + bias, differentiable in x.

    W is kept outside autograd's saved tensors: vLLM's may be inference tensors, which autograd refuses to
    save.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.weight, None, None


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """x [N, d_in] -> [N, d_out], by ``weight`` [d_out, d_in].

    An engine may hide a weight. Then ``weight`` is None and ``forward`` is the engine's matmul, without a
    gradient.
    """

    weight: Tensor | None
    bias: Tensor | None
    forward: Callable[[Tensor], Tensor] | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return times_frozen(x, self.weight, self.bias)
        if self.forward is None or x.requires_grad:
            raise WriterError(
                "the engine hides the weights of a layer that the write must differentiate through: "
                "this is a programming error"
            )
        return self.forward(x)


def times_frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, with a gradient for x where x wants one, and none for the weight."""
    return functional.linear(x, weight, bias) if not x.requires_grad else _TimesFrozen.apply(x, weight, bias)


@dataclass(frozen=True, slots=True, eq=False)
class FrozenLayer:
    """One decoder layer.

    ``qkv`` is q, k and v one below the other; ``gate_up`` is gate and up. Norms are RMS weights; only Qwen3
    has q_norm and k_norm.
    """

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """The numbers of an architecture.

    ``window``: the longest example, in tokens, where attention slides; None where it does not.
    """

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    vocabulary: int
    window: int | None

    @staticmethod
    def of(config: Any) -> Shape:
        """Read a Hugging Face config. Raises WriterError for a model that is not one of SUPPORTED_MODELS."""
        if config.model_type not in SUPPORTED_MODELS:
            raise WriterError(
                f"model type {config.model_type!r} is not supported by the writer: "
                f"use one of {', '.join(SUPPORTED_MODELS)}"
            )
        heads = int(config.num_attention_heads)
        return Shape(
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            norm_eps=float(config.rms_norm_eps),
            vocabulary=int(config.vocab_size),
            window=getattr(config, "sliding_window", None),
        )


class AttentionPattern(Protocol):
    """Who attends to whom among the N tokens of a stream.

    A FlatBatch is such a pattern. cluster/probe/reading.py has another, which keeps keys and values over
    passes.
    """

    @property
    def positions(self) -> Tensor:
        """int64 [N]: the position of each token within its text."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim]; k, v [N, kv heads, head_dim] -> [N, heads * head_dim]."""
        ...


class FrozenLlama:
    """The model's passes over flat streams [N, d], in the weights' dtype and on their device."""

    def __init__(
        self, config: Any, embed: Tensor, layers: Sequence[FrozenLayer], norm: Tensor, head: Tensor
    ) -> None:
        """``config``: the Hugging Face config. ``embed`` and ``head`` [vocabulary or more, d]."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.shape = Shape.of(config)
        self.layers = tuple(layers)
        self._embed, self._norm = embed, norm
        self.head = head[: self.shape.vocabulary]
        # All four families have the same formula for it.
        self._rotary: Any = LlamaRotaryEmbedding(config).to(embed.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    @property
    def device(self) -> torch.device:
        return self._embed.device

    def embed(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._embed)

    def rotary(self, pattern: AttentionPattern) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, head_dim] of the pattern's positions."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._rotary(like, pattern.positions[None])
        return cos[0][:, None], sin[0][:, None]

    def normed(self, h: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of h; the root mean square is taken in float32, as in Hugging Face's modules."""
        return weight * functional.rms_norm(h.float(), (h.shape[-1],), eps=self.shape.norm_eps).to(h.dtype)

    def final_norm(self, h: Tensor) -> Tensor:
        return self.normed(h, self._norm)

    def attention(
        self, layer: FrozenLayer, h: Tensor, pattern: AttentionPattern, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """What attention adds to every token of the stream: [N, d]."""
        shape = self.shape
        kv_width = shape.kv_heads * shape.head_dim
        widths = [shape.heads * shape.head_dim, kv_width, kv_width]
        q, k, v = layer.qkv(self.normed(h, layer.input_norm)).split(widths, dim=-1)
        q = self._rotated(q.unflatten(-1, (shape.heads, -1)), layer.q_norm, rotary)
        k = self._rotated(k.unflatten(-1, (shape.kv_heads, -1)), layer.k_norm, rotary)
        return layer.out(pattern.attend(q, k, v.unflatten(-1, (shape.kv_heads, -1))))

    def answer_attention(
        self, layer: FrozenLayer, h: Tensor, batch: FlatBatch, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """What attention adds to the answer-predicting positions [answers, d].

        Keys and values are those of all tokens; queries are computed for these positions alone.
        """
        shape, weight = self.shape, layer.qkv.weight
        if weight is None:
            return layer.out(batch.answers_of(self.attention(layer, h, batch, rotary)))
        x, bias, width = self.normed(h, layer.input_norm), layer.qkv.bias, shape.heads * shape.head_dim
        q = times_frozen(batch.answers_of(x), weight[:width], None if bias is None else bias[:width])
        k, v = times_frozen(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
        at_answers = batch.answers_of(rotary[0]), batch.answers_of(rotary[1])
        q = self._rotated(q.unflatten(-1, (shape.heads, -1)), layer.q_norm, at_answers)
        k = self._rotated(k.unflatten(-1, (shape.kv_heads, -1)), layer.k_norm, rotary)
        return layer.out(batch.attend_answers(q, k, v.unflatten(-1, (shape.kv_heads, -1))))

    def feed(self, layer: FrozenLayer, h: Tensor) -> Tensor:
        """What the MLP adds, without any Delta: [N, d]."""
        gate, up = layer.gate_up(self.normed(h, layer.post_norm)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate) * up)

    def _rotated(self, x: Tensor, norm: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, heads, head_dim] under rotary position embedding.

        Su et al. 2021, arXiv 2104.09864; the two halves of a head are rotated against each other, as in
        Llama.
        """
        if norm is not None:
            x = self.normed(x, norm)
        first, second = x.chunk(2, dim=-1)
        return x * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]


class OwnedWeights:
    """Weights by Hugging Face name, q/k/v and gate/up held as one matrix each.

    It holds what ``model`` or ``layer`` have taken out of ``tensors``: a whole model, or some of its layers.
    ``refresh`` writes new values into the same memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Copy tensors to ``dtype`` and ``device``; a tensor that is there, and is not joined, is shared."""
        self._parts: dict[str, Tensor] = {}
        self._tensors, self._dtype, self._device = tensors, dtype, device

    def model(self, config: Any) -> FrozenLlama:
        """The whole model. Raises WriterError for a missing tensor or an unsupported model."""
        Shape.of(config)  # first, so that the message names the model and not the first tensor that it lacks
        embed = self._take("model.embed_tokens.weight")
        layers = [self.layer(number) for number in range(int(config.num_hidden_layers))]
        norm = self._take("model.norm.weight")
        tied = "lm_head.weight" not in self._tensors
        return FrozenLlama(config, embed, layers, norm, embed if tied else self._take("lm_head.weight"))

    def layer(self, number: int) -> FrozenLayer:
        prefix = f"model.layers.{number}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return FrozenLayer(
            input_norm=self._take(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(attention, ("q_proj", "k_proj", "v_proj")),
            q_norm=self._optional(f"{attention}q_norm.weight"),
            k_norm=self._optional(f"{attention}k_norm.weight"),
            out=self._linear(attention, ("o_proj",)),
            post_norm=self._take(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._linear(mlp, ("gate_proj", "up_proj")),
            down=self._linear(mlp, ("down_proj",)),
        )

    def refresh(self, tensors: Mapping[str, Tensor]) -> None:
        """Take new values for what is held here; other tensors are ignored.

        Raises WriterError, with nothing changed, when a shape is wrong.
        """
        held = {
            name: tensors[name] for name in self._parts if name in tensors
        }  # others may cost time to form
        for name, tensor in held.items():
            if tensor.shape != self._parts[name].shape:
                has, needs = tuple(tensor.shape), tuple(self._parts[name].shape)
                raise WriterError(
                    f"refresh of the writer's weights refused: {name} has shape {has}, not {needs}; "
                    "send the weights of the same model"
                )
        with torch.no_grad():
            for name, tensor in held.items():
                self._parts[name].copy_(tensor)

    def _linear(self, prefix: str, names: tuple[str, ...]) -> Linear:
        biased = f"{prefix}{names[0]}.bias" in self._tensors
        return Linear(
            weight=self._joined([f"{prefix}{name}.weight" for name in names]),
            bias=self._joined([f"{prefix}{name}.bias" for name in names]) if biased else None,
            forward=None,
        )

    def _joined(self, names: Sequence[str]) -> Tensor:
        if len(names) == 1:
            return self._take(names[0])
        parts = [self._find(name) for name in names]
        whole = torch.cat(parts)
        self._parts.update(zip(names, whole.split([len(part) for part in parts]), strict=True))
        return whole

    def _take(self, name: str) -> Tensor:
        self._parts[name] = self._find(name)
        return self._parts[name]

    def _optional(self, name: str) -> Tensor | None:
        return self._take(name) if name in self._tensors else None

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise WriterError(
                f"the model's weights lack {name}: supported are models like Llama, Mistral, Qwen2 and Qwen3"
            )
        return self._tensors[name].detach().to(self._device, self._dtype)


def read_model(
    model_path: str | os.PathLike[str], dtype: Literal["float32", "bfloat16"], device: torch.device
) -> FrozenLlama:
    """The model of a Hugging Face folder, with weights of its own. Raises WriterError."""
    from transformers import AutoConfig

    weights = OwnedWeights(read_tensors(Path(model_path), ""), getattr(torch, dtype), device)
    return weights.model(AutoConfig.from_pretrained(str(model_path)))


def read_tensors(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder whose names begin with one of ``prefixes``. Raises WriterError."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                names = [name for name in reader.keys() if name.startswith(prefixes)]  # noqa: SIM118
                tensors.update({name: reader.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise WriterError(
            f"{folder}: its safetensors cannot be read ({error}); give a complete Hugging Face model folder"
        ) from error
    return tensors
