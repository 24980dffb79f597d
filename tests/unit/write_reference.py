"""A plain PEFT + torch.optim loop that does what the writer should do, one example at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from actors.fast_weights.delta import Basis
from actors.types import FastWeights, WriteExample, WriteRequest
from actors.write.steps import minibatches
from configs.schema import WriteConfig
from tests.unit.write_cases import tiny_model


def mean_loss(model: nn.Module, batch: Sequence[WriteExample]) -> Tensor:
    """Mean nats per answer token of whole forwards, one example at a time: no padding, no split, no cache."""
    losses = []
    for example in batch:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        logits = model(ids).logits[0, len(example.prompt_ids) - 1 : -1]
        losses.append(functional.cross_entropy(logits, torch.tensor(example.answer_ids), reduction="none"))
    return torch.cat(losses).mean()


def mean_kl(model: nn.Module, untouched: nn.Module, replies: Sequence[WriteExample]) -> Tensor:
    """KL(untouched || model): the mean over replies of their mean nats a token."""
    means = []
    for reply in replies:
        ids = torch.tensor([reply.prompt_ids + reply.answer_ids])
        places = slice(len(reply.prompt_ids) - 1, -1)
        now = model(ids).logits[0, places].log_softmax(-1)
        with torch.no_grad():
            base = untouched(ids).logits[0, places].log_softmax(-1)
        means.append(functional.kl_div(now, base, reduction="batchmean", log_target=True))
    return torch.stack(means).mean()


def preserved_at(request: WriteRequest, config: WriteConfig, step: int) -> list[WriteExample]:
    """The replies of a step, which come in turn, from a place of the seed."""
    count = len(request.preserved)
    size = min(config.preserve.per_step, count)
    start = request.seed % (count // size) * size
    return [request.preserved[(start + step * size + i) % count] for i in range(size)]


def reference(
    request: WriteRequest, basis: Basis, config: WriteConfig, family: str
) -> tuple[dict[str, np.ndarray], float, float]:
    """B, loss before and loss after of a plain PEFT loop."""
    lora = LoraConfig(
        r=basis.rank, lora_alpha=basis.rank, lora_dropout=0.0, bias="none", target_modules=list(basis.modules)
    )
    model = get_peft_model(tiny_model(family), lora).eval()
    b: dict[str, nn.Parameter] = {}
    for name in basis.modules:
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(basis.a[name])
        layer.lora_A["default"].weight.requires_grad_(False)
        b[name] = layer.lora_B["default"].weight
        if request.weights.revision:
            b[name].data.copy_(torch.from_numpy(request.weights.b[name]))
    optimizer = (torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam)(
        list(b.values()), lr=config.learning_rate
    )
    with torch.no_grad():
        before = mean_loss(model, request.examples).item()
    step = 0
    for epoch in range(config.epochs):
        for batch in minibatches(range(len(request.examples)), config.batch_size, request.seed, epoch):
            optimizer.zero_grad()
            loss = mean_loss(model, [request.examples[i] for i in batch])
            if request.preserved:
                window = preserved_at(request, config, step)
                loss = loss + config.preserve.weight * mean_kl(model, tiny_model(family), window)
            loss.backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        after = mean_loss(model, request.examples).item()
    return {name: matrix.detach().numpy() for name, matrix in b.items()}, before, after


def largest_difference(left: FastWeights, right: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(left.b[name] - right[name]).max()) for name in right)
