"""A moving average of the weights: what is validated, saved and predicted with, while training goes
on with the weights themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KEY = "autoreg_training_weights"
"""Where a checkpoint's optimiser state holds the weights themselves; the network's place holds the
average.
"""


class MovingAverage:
    """The average of a network's parameters.

    Early in a run it forgets faster: the factor of step n is at most (1 + n) / (10 + n).

    Args:
        network: unwrapped.
        decay: factor per step, in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = network, decay
        self.values: list[Tensor] = []
        self.loaded: list[Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin from the weights as they are."""
        self.values = [p.detach().clone() for p in self.network.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step``, from 0."""
        factor = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            self.values, [p.detach() for p in self.network.parameters()], 1 - factor
        )

    @contextmanager
    def applied(self) -> Iterator[list[Tensor]]:
        """Let the network have the average; gives its own weights, which it has again
        afterwards.
        """
        own = [p.detach().clone() for p in self.network.parameters()]
        self._copy(self.values)
        try:
            yield own
        finally:
            self._copy(own)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a saved state of the optimiser carry the weights themselves: its network holds the
        average while it is saved.

        nnU-Net fixes what a checkpoint consists of; the optimiser's state is the one part that may
        have entries of ours.
        """
        optimizer.register_state_dict_post_hook(self._with_weights)
        optimizer.register_load_state_dict_pre_hook(self._take_weights)
        self.saving: list[Tensor] | None = None

    @contextmanager
    def saved(self) -> Iterator[None]:
        """While a checkpoint is written: the average as the network, the weights themselves in the
        optimiser's state.
        """
        with self.applied() as own:
            self.saving = own
            try:
                yield
            finally:
                self.saving = None

    def restore(self) -> None:
        """After a checkpoint was loaded: its network is the average, the weights themselves come
        from the optimiser's state.
        """
        self.reset()
        if self.loaded is not None:
            self._copy(self.loaded)
            self.loaded = None

    def _with_weights(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state if self.saving is None else {**state, KEY: self.saving}

    def _take_weights(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        self.loaded = state.get(KEY)
        return {key: value for key, value in state.items() if key != KEY}

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.network.parameters(), values, strict=True):
            parameter.copy_(value)
