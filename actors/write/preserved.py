"""The distributions that preserved replies keep: those of the policy without Delta, made once a version."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from actors.fast_weights.delta import Basis, stack, zero
from actors.types import WriteExample
from actors.write.lower_layers import Row
from actors.write.upper_layers import UpperLayers

_KEPT_TOKENS = 512  # 100 MB at a vocabulary of 49k, 310 MB at 152k


class PreservedReplies:
    """Remembers the newest distributions. For one theta, as the writer is."""

    def __init__(self, layers: UpperLayers, basis: Basis, device: torch.device) -> None:
        self._layers = layers
        self._nothing = stack([zero(basis)], basis, torch.float32, device)
        self._remembered: OrderedDict[WriteExample, Tensor] = OrderedDict()  # oldest first

    def rows(self, prefix: int, rows: Sequence[Row]) -> list[Row]:
        """Give ``rows`` the distributions that they keep. All begin with the same ``prefix`` tokens."""
        missing = {row.example: row for row in rows if row.example not in self._remembered}
        if missing:
            # All under episode 0: its Delta is the only one here, and it is 0.
            chunks = self._layers.prepare(prefix, [replace(row, episode=0) for row in missing.values()])
            made = self._layers.distributions(chunks, self._nothing)
            self._remembered.update(zip(missing, made, strict=True))
        for row in rows:
            self._remembered.move_to_end(row.example)
        based = [replace(row, base=self._remembered[row.example]) for row in rows]
        self._forget()
        return based

    def _forget(self) -> None:
        kept = sum(len(base) for base in self._remembered.values())
        while kept > _KEPT_TOKENS:
            _, oldest = self._remembered.popitem(last=False)
            kept -= len(oldest)
