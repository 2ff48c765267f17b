"""Rows of a batch and their adapters, whose weights are read where they lie: for a processor, in float32."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch

from serve.torch.fused import Part
from serve.torch.low_rank import Weights
from serve.torch.native import lora
from serve.torch.native.function import lanes

NONE = (0,) * len(lora.PART)
"""What is known of a part that an adapter does not change."""


class Plan:
    """Which rows of a batch have an adapter, and where the weights are."""

    def __init__(
        self, members: Mapping[Hashable, Sequence[int]], weights: Sequence[Weights], parts: torch.Tensor, batch: int
    ) -> None:
        """The rows of each adapter, their weights and parts (adapters, layers, parts, PART), how many rows in all."""
        self.batch, self.parts = batch, parts
        self.weights = weights  # which stay in memory
        self.rank = max(adapter.rank for adapter in weights)
        self._rows = torch.tensor([row for own in members.values() for row in own])
        self._bounds = torch.tensor([0, *accumulate(map(len, members.values()))])
        self._tokens: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def tokens(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that have an adapter, `width` of each row, in the order of the adapters, and where each begins."""
        if width not in self._tokens:
            order = (self._rows[:, None] * width + torch.arange(width)).flatten()
            self._tokens[width] = order, self._bounds * width
        return self._tokens[width]


class Places:
    """Where adapters have their weights for each layer that was met."""

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._known: WeakKeyDictionary[Weights, torch.Tensor] = WeakKeyDictionary()

    def layer(self, parts: Mapping[str, Part], like: torch.Tensor) -> Layer:
        """A layer with these parts more, which takes as many numbers as A of an adapter `like` (rank, in)."""
        self._layers.append(layer := Layer(len(self._layers), parts, like.shape[1]))
        return layer

    def plan(self, rows: Sequence[Hashable], pool: Mapping[Any, Weights], width: int) -> Plan | None:  # noqa: ARG002
        """How layers have to compute rows of these adapters, with however many tokens."""
        members: dict[Hashable, list[int]] = {}
        for row, key in enumerate(rows):
            if key:
                members.setdefault(key, []).append(row)
        if not members:
            return None
        weights = [pool[key] for key in members]
        return Plan(members, weights, torch.stack([self._of(adapter) for adapter in weights]), len(rows))

    @property
    def bytes(self) -> int:
        """The memory of copies: there are none."""
        return 0

    def _of(self, weights: Weights) -> torch.Tensor:
        """(layers, parts, PART); layers with fewer parts than others have empty ones behind them."""
        most = max(len(layer.parts) for layer in self._layers)
        known = self._known.get(weights)
        if known is None or known.shape[:2] != (len(self._layers), most):
            known = torch.tensor([(layer.known(weights) + [NONE] * most)[:most] for layer in self._layers])
            self._known[weights] = known
        return known


class Layer:
    """A linear layer that adapters change, some of its outputs by each of its `parts`."""

    def __init__(self, number: int, parts: Mapping[str, Part], inputs: int) -> None:
        self.parts, self._number, self._inputs = parts, number, inputs
        ends = [end for part in parts.values() for end in (part.first, part.last)]
        self._outputs = max(ends)
        self._plan: Plan | None = None
        self._call = lora.lora(lanes(inputs, *ends)).with_(inputs=inputs, outputs=self._outputs, count=len(parts))
        self._width = 0
        self._ready: torch.Tensor | None = None
        """The output that the call is ready for, if it stays where it is."""

    def known(self, weights: Weights) -> list[tuple[int, ...]]:
        """`lora.PART` of each part."""
        return [_known(weights, name, part) if name in weights.layers else NONE for name, part in self.parts.items()]

    def follow(self, plan: Plan | None) -> None:
        """Compute the next forward passes by `plan`; with None, leave the layer's output as it is."""
        self._plan, self._width, self._ready = plan, 0, None
        if plan is not None:
            fields, (adapter, layer, *_) = self._call.fields, plan.parts.stride()
            fields.parts = plan.parts.data_ptr() + layer * self._number * plan.parts.itemsize
            fields.of_adapter, fields.adapters = adapter, len(plan.parts)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """To the output for `x`. They are (B, Q, ...), or (B * Q, ...) as a mixture of experts flattens them."""
        plan = self._plan
        if plan is None:
            return
        if output.dtype != torch.float32 or not output.is_contiguous():
            whole = output.float().contiguous()
            self.add(x, whole)
            output.copy_(whole)
            return
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        fields = self._call.fields
        width, rest = divmod(x.numel(), self._inputs * plan.batch)
        if rest:
            raise ValueError(f"{x.numel() // self._inputs} inputs of a layer are not the tokens of {plan.batch} rows")
        if width != self._width:
            self._width, (order, bounds) = width, plan.tokens(width)
            fields.order, fields.bounds, fields.tokens = order.data_ptr(), bounds.data_ptr(), len(order)
        fields.x, fields.result, self._ready = x.data_ptr(), output.data_ptr(), None
        self._again = self._call.ways[fields.tokens * plan.rank * (self._inputs + self._outputs) > lora.FEW]
        self._again()

    def at(self, x: torch.Tensor, output: torch.Tensor) -> Callable[[], object]:
        """What does so again and again, for tensors that stay where they are: float32, contiguous."""

        def again() -> None:
            if self._plan is None:
                return
            if self._ready is output:
                self._again()
            else:
                self.add(x, output)
                self._ready = output

        return again


def _known(weights: Weights, name: str, part: Part) -> tuple[int, ...]:
    a, b = weights.layers[name]
    scale = [tensor.data_ptr() for tensor in weights.scales[name]] if name in weights.scales else [0, 0]
    return a.data_ptr(), b.data_ptr(), len(a), part.first, part.last - part.first, *scale
