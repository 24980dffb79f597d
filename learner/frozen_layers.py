"""The layers that no step changes: run once for each microbatch of a step, for all passes of it.

    passes of a step:  old log-probs (several minibatches), the KL term's reference, the training pass itself
    all of them:       tokens --frozen layers, once--> states --the other layers--> log-probs

With ``learner.trainable=last_layers`` the first layers are frozen, and those below the fast weights know no
Delta. Policy and reference have the same ones. So every pass gets the same states, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from actors.fast_weights.delta import Basis
from configs.schema import LearnerConfig
from learner.model import PolicyModel
from learner.types import Microbatch


class FrozenLayers:
    """Remembers the states of microbatches, of d numbers a token, while ``remembered`` is entered."""

    def __init__(self, model: PolicyModel, config: LearnerConfig, basis: Basis) -> None:
        self._model = model
        self.count = frozen_layers(len(model.base.get_decoder().layers), config, basis)
        self._states: dict[Microbatch, Tensor] | None = None  # a microbatch is equal to itself alone

    @contextmanager
    def remembered(self, several_passes: bool) -> Iterator[None]:
        """Let ``states`` remember, where several passes run over the same microbatches."""
        self._states = {} if several_passes and self.count else None
        try:
            yield
        finally:
            self._states = None

    def states(self, microbatch: Microbatch, token_ids: Tensor) -> Tensor | None:
        """Return the states [n, T, d] behind the frozen layers; None where all layers are to be run."""
        if self._states is None:
            return None
        if microbatch not in self._states:
            self._states[microbatch] = self._model.states_behind(self.count, token_ids)
        return self._states[microbatch]


def frozen_layers(layers: int, config: LearnerConfig, basis: Basis) -> int:
    """How many layers from the first neither training nor Delta changes.

    0 under ZeRO-3: its weights are gathered inside the engine's own forward only.
    """
    if config.trainable != "last_layers" or config.zero_stage == 3:
        return 0
    return min(layers - config.trainable_layers, basis.first_layer)
