"""An adapter in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch


class Scale(NamedTuple):
    """What DoRA does to the output of a layer of the base: y `gain` + `shift`, both (out,), in float32."""

    gain: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """For each linear layer, by its name, A (rank, in) and scaling * B^T (rank, out).

    With DoRA (arXiv:2402.09353) B has the gain of `scales` in it already.
    """

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @cached_property
    def rank(self) -> int:
        """The highest of a layer."""
        return max((len(a) for a, _ in self.layers.values()), default=0)


NOTHING = Weights({})
"""What the base adds to itself."""
