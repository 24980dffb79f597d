"""Named full tensors out of the training engine: what a broadcast publishes and a checkpoint stores."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from torch import Tensor, nn

from learner.engine import TrainingEngine
from learner.model import PolicyModel


def named_parameters(model: PolicyModel, trainable_only: bool) -> list[tuple[str, nn.Parameter]]:
    """Hugging Face names ("model.layers.0.mlp.up_proj.weight"); a tied head is listed once, as the embedding."""
    return [
        (name, param)
        for name, param in model.base.named_parameters()
        if param.requires_grad or not trainable_only
    ]


def full_tensors(
    engine: TrainingEngine, parameters: list[tuple[str, nn.Parameter]], copy: bool
) -> Iterator[tuple[str, Tensor]]:
    """The parameters' full values on the CPU, contiguous, in the training dtype. Collective under ZeRO-3: all ranks iterate to the end.

    Without ``copy`` they may be the parameters' own memory, which the next step overwrites: for who writes them out at once.
    """
    for name, param in parameters:
        if engine.zero_stage == 3:
            with deepspeed.zero.GatheredParameters([param]):
                tensor = param.detach().to("cpu", copy=True)
        else:
            tensor = param.detach().to("cpu", copy=copy)
        yield name, tensor.contiguous()


@torch.no_grad()
def load_tensors(
    engine: TrainingEngine, parameters: list[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    """Set the parameters that act (not the optimizer's float32 masters) to ``tensors``. Collective under ZeRO-3."""
    for name, param in parameters:
        if engine.zero_stage == 3:
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.data.copy_(tensors[name])
        else:
            param.data.copy_(tensors[name])
