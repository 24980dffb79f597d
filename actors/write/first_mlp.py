"""What the first adapted MLP does with its input before B acts: the same at every step and in every write.

lower_layers.py --> Row.hidden --> Stream: the residual stream, W x and A x, kept for the newest examples
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.fast_weights.delta import Basis
from actors.types import WriteExample
from actors.write.frozen_llama import FrozenLlama
from actors.write.lower_layers import Row

GATE_AND_UP = ("gate_proj", "up_proj")
_KEPT_TOKENS = 8192  # 120 MB of SmolLM2-135M in float32


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Tokens in front of the first adapted MLP.

    hidden [n, d], gate_up [n, 2 f], shrunk [n, rank] by projection: the residual stream, W x and A x.
    x [n, d]: the MLP's input, kept where the write moves A too, as there is no A x to keep; else None.
    """

    hidden: Tensor
    gate_up: Tensor
    shrunk: Mapping[str, Tensor]
    x: Tensor | None

    def __len__(self) -> int:
        return len(self.hidden)

    def part(self, start: int, end: int) -> Stream:
        return self.map(lambda tensor: tensor[start:end])

    def first(self, tokens: int) -> Stream:
        return self.part(0, tokens)

    def last(self, tokens: int) -> Stream:
        return self.part(len(self) - tokens, len(self))

    def map(self, change: Callable[[Tensor], Tensor]) -> Stream:
        x = None if self.x is None else change(self.x)
        shrunk = {name: change(tensor) for name, tensor in self.shrunk.items()}
        return Stream(change(self.hidden), change(self.gate_up), shrunk, x)

    @staticmethod
    def joined(streams: Sequence[Stream]) -> Stream:
        """One behind the other; at least one."""
        names, xs = streams[0].shrunk, [stream.x for stream in streams if stream.x is not None]
        return Stream(
            torch.cat([stream.hidden for stream in streams]),
            torch.cat([stream.gate_up for stream in streams]),
            {name: torch.cat([stream.shrunk[name] for stream in streams]) for name in names},
            torch.cat(xs) if xs else None,
        )


class FirstMlp:
    """Makes streams, and remembers the newest. For one theta, as the writer is."""

    def __init__(self, model: FrozenLlama, basis: Basis, a: Mapping[str, Tensor], chunk_tokens: int) -> None:
        self._model, self._layer = model, model.layers[basis.first_layer]
        keys = {name: key_of(basis.first_layer, name) for name in GATE_AND_UP}
        self._a = {} if basis.train_a else {name: a[key] for name, key in keys.items() if key in a}
        self._keeps_x, self._chunk_tokens = basis.train_a, chunk_tokens
        self._remembered: OrderedDict[WriteExample, Stream] = OrderedDict()  # oldest first

    @torch.no_grad()
    def streams(self, rows: Sequence[Row]) -> list[Stream]:
        """The stream of each row, all inputs of its example."""
        wanted = {row.example: row.hidden for row in rows}
        missing = {example: hidden for example, hidden in wanted.items() if example not in self._remembered}
        self._remembered.update(zip(missing, self._made(list(missing.values())), strict=True))
        for example in wanted:
            self._remembered.move_to_end(example)
        streams = [self._remembered[row.example] for row in rows]
        self._forget(len(wanted))
        return streams

    def _made(self, hidden: Sequence[Tensor]) -> Iterator[Stream]:
        block: list[Tensor] = []
        for number, of_row in enumerate(hidden, start=1):
            block.append(of_row)
            if number == len(hidden) or sum(map(len, block)) >= self._chunk_tokens:
                yield from self._split(self._pass(torch.cat(block)), [len(tensor) for tensor in block])
                block = []

    def _pass(self, hidden: Tensor) -> Stream:
        x = self._model.normed(hidden, self._layer.post_norm)
        shrunk = {name: x @ a.T for name, a in self._a.items()}
        return Stream(hidden, self._layer.gate_up(x), shrunk, x if self._keeps_x else None)

    @staticmethod
    def _split(stream: Stream, sizes: Sequence[int]) -> Iterator[Stream]:
        start = 0
        for size in sizes:
            # A copy: a view would keep the whole block alive when the others are forgotten.
            yield stream.part(start, start + size).map(torch.clone)
            start += size

    def _forget(self, newest: int) -> None:
        """Forget old examples beyond ``_KEPT_TOKENS``. Not the ``newest``: the next step uses them again."""
        kept = sum(len(stream) for stream in self._remembered.values())
        while kept > _KEPT_TOKENS and len(self._remembered) > newest:
            _, oldest = self._remembered.popitem(last=False)
            kept -= len(oldest)


def key_of(layer: int, projection: str) -> str:
    """The name of an adapted matrix."""
    return f"model.layers.{layer}.mlp.{projection}"
