"""A frozen causal LM as plain tensors, for passes that no engine and no Hugging Face module makes: flat streams, cut layers, gradients of B.

    weights (a checkpoint's, or vLLM's own: engine_weights.py)  -->  FrozenLlama: embed, layers, norm, head
    FlatBatch (layout.py): which tokens of the flat stream belong together, and who attends to whom

The families are those whose decoder layer is h += attention(norm(h)); h += mlp(norm(h)): Llama, Mistral, Qwen2, Qwen3. No weight gets a gradient.
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
    """x W^T + bias, differentiable in x. W is no saved tensor: vLLM's may be inference tensors, which autograd refuses to save."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.weight, None, None


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """x [N, d_in] -> [N, d_out]. ``weight`` [d_out, d_in] where it can be seen; else ``forward`` is the owner's own matmul, without a gradient."""

    weight: Tensor | None
    bias: Tensor | None
    forward: Callable[[Tensor], Tensor] | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return times_frozen(x, self.weight, self.bias)
        if self.forward is None or x.requires_grad:
            raise WriterError(
                "the engine hides the weights of a layer that the write must differentiate through; this is a programming error"
            )
        return self.forward(x)


def times_frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias."""
    return functional.linear(x, weight, bias) if not x.requires_grad else _TimesFrozen.apply(x, weight, bias)


@dataclass(frozen=True, slots=True, eq=False)
class FrozenLayer:
    """One decoder layer. ``qkv`` is q, k, v below each other, ``gate_up`` gate and up; norms are RMS weights; q_norm and k_norm only in Qwen3."""

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
    """The numbers of an architecture. ``window``: how many tokens an example may have at most where attention slides, else None."""

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    vocabulary: int
    window: int | None

    @staticmethod
    def of(config: Any) -> Shape:
        """From a Hugging Face config. Raises WriterError for a model that is not one of SUPPORTED_MODELS."""
        if config.model_type not in SUPPORTED_MODELS:
            raise WriterError(
                f"model type {config.model_type!r} is not supported by the writer: use one of {', '.join(SUPPORTED_MODELS)}"
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
    """What attention needs to know about the N tokens of a stream: a FlatBatch, or one of whoever keeps keys and values from pass to pass."""

    @property
    def positions(self) -> Tensor:
        """int64 [N]: of each token within its text."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, head_dim]; k, v [N, kv heads, head_dim] -> [N, heads * head_dim]."""
        ...


class FrozenLlama:
    """See the module's text. Streams are flat: [N, d] for the N tokens of a FlatBatch; dtype and device are the weights'."""

    def __init__(
        self, config: Any, embed: Tensor, layers: Sequence[FrozenLayer], norm: Tensor, head: Tensor
    ) -> None:
        """``config``: the Hugging Face config. ``embed`` and ``head`` [vocabulary or more, d]."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.shape = Shape.of(config)
        self.layers = tuple(layers)
        self._embed, self._norm = embed, norm
        self.head = head[: self.shape.vocabulary]
        self._rotary: Any = LlamaRotaryEmbedding(config).to(
            embed.device
        )  # the same formula in all four families

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    @property
    def device(self) -> torch.device:
        return self._embed.device

    def embed(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._embed)

    def rotary(self, layout: AttentionPattern) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, head_dim] of the layout's positions."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._rotary(like, layout.positions[None])
        return cos[0][:, None], sin[0][:, None]

    def normed(self, h: Tensor, weight: Tensor) -> Tensor:
        """RMS norm, in float32 as in Hugging Face's modules."""
        return weight * functional.rms_norm(h.float(), (h.shape[-1],), eps=self.shape.norm_eps).to(h.dtype)

    def final_norm(self, h: Tensor) -> Tensor:
        return self.normed(h, self._norm)

    def attention(
        self, layer: FrozenLayer, h: Tensor, layout: AttentionPattern, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """What attention adds to every token of the stream: [N, d]."""
        shape = self.shape
        q, k, v = layer.qkv(self.normed(h, layer.input_norm)).split(
            [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim],
            dim=-1,
        )
        q = self._rotated(q.unflatten(-1, (shape.heads, -1)), layer.q_norm, rotary)
        k = self._rotated(k.unflatten(-1, (shape.kv_heads, -1)), layer.k_norm, rotary)
        return layer.out(layout.attend(q, k, v.unflatten(-1, (shape.kv_heads, -1))))

    def answer_attention(
        self, layer: FrozenLayer, h: Tensor, layout: FlatBatch, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The same at answer-predicting positions only [answers, d]: keys and values of all tokens, queries of those."""
        shape, weight = self.shape, layer.qkv.weight
        if weight is None:
            return layer.out(layout.answers_of(self.attention(layer, h, layout, rotary)))
        x, bias, width = self.normed(h, layer.input_norm), layer.qkv.bias, shape.heads * shape.head_dim
        q = times_frozen(layout.answers_of(x), weight[:width], None if bias is None else bias[:width])
        k, v = times_frozen(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
        at_answers = layout.answers_of(rotary[0]), layout.answers_of(rotary[1])
        q = self._rotated(q.unflatten(-1, (shape.heads, -1)), layer.q_norm, at_answers)
        k = self._rotated(k.unflatten(-1, (shape.kv_heads, -1)), layer.k_norm, rotary)
        return layer.out(layout.attend_answers(q, k, v.unflatten(-1, (shape.kv_heads, -1))))

    def feed(self, layer: FrozenLayer, h: Tensor) -> Tensor:
        """What the MLP adds, without any Delta: [N, d]."""
        gate, up = layer.gate_up(self.normed(h, layer.post_norm)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate) * up)

    def _rotated(self, x: Tensor, norm: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, heads, head_dim] under rotary position embedding (Su et al. 2021, in the halves layout of Llama)."""
        if norm is not None:
            x = self.normed(x, norm)
        first, second = x.chunk(2, dim=-1)
        return x * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]


class OwnedWeights:
    """Tensors by Hugging Face name, q/k/v and gate/up held as one matrix each; ``refresh`` writes new values into the same memory.

    Of a whole model, or of some of its layers only: it holds what ``layer`` and ``model`` have taken out of ``tensors``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Tensors are copied to ``dtype`` and ``device``, unless they are there already and need not be joined."""
        self._parts: dict[str, Tensor] = {}
        self._tensors, self._dtype, self._device = tensors, dtype, device

    def model(self, config: Any) -> FrozenLlama:
        """All of it. Raises WriterError for a missing tensor or an unsupported model."""
        Shape.of(config)  # an unsupported model is named as such, not by the tensor that it lacks
        embed = self._take("model.embed_tokens.weight")
        layers = [self.layer(number) for number in range(int(config.num_hidden_layers))]
        tied = "lm_head.weight" not in self._tensors
        return FrozenLlama(
            config,
            embed,
            layers,
            self._take("model.norm.weight"),
            embed if tied else self._take("lm_head.weight"),
        )

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
        """New values for the held ones among ``tensors``. All shapes are checked first. Raises WriterError with nothing changed."""
        mine = {name: tensor for name, tensor in tensors.items() if name in self._parts}
        wrong = [name for name, tensor in mine.items() if tensor.shape != self._parts[name].shape]
        if wrong:
            has, needs = tuple(mine[wrong[0]].shape), tuple(self._parts[wrong[0]].shape)
            raise WriterError(
                f"refresh of the writer's weights refused: {wrong[0]} has shape {has}, not {needs}; send the weights of the same model"
            )
        with torch.no_grad():
            for name, tensor in mine.items():
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
    """The model of a Hugging Face folder, with weights of its own."""
    from transformers import AutoConfig

    tensors = read_tensors(Path(model_path), "")
    return OwnedWeights(tensors, getattr(torch, dtype), device).model(
        AutoConfig.from_pretrained(str(model_path))
    )


def read_tensors(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder whose names begin with one of ``prefixes``, from its safetensors files. Raises WriterError."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                names = [name for name in reader.keys() if name.startswith(prefixes)]  # noqa: SIM118  (no mapping)
                tensors.update({name: reader.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise WriterError(
            f"{folder}: its safetensors cannot be read ({error}); give a complete Hugging Face model folder"
        ) from error
    return tensors
