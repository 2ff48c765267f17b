"""Many LoRA adapters in one forward pass: rows of the base and of any adapters mixed in a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from serve.torch.fused import Part
from serve.torch.layers import Projection
from serve.torch.low_rank import Scale, Weights
from serve.torch.native.adapters import Places
from serve.torch.slots import Slots


class MultiLora:
    """Adds `x A^T B^T * scaling` of each row's adapter to the output of every adapted linear layer.

    On a processor in float32 a compiled function reads each row's adapter where it lies (`Places`); else rows are
    brought together for batched products (`Slots`). A row's result comes from products of its own, whatever its
    neighbours ask for. `model.parts` says which layers of the checkpoint are one now (`serve.torch.fused`). Only
    outputs of layers are touched, so the layers may be quantized.
    """

    def __init__(self, model: Any, memory: int) -> None:
        self._model = model
        native = model.device.type == "cpu" and model.dtype == torch.float32
        self._products: Places | Slots = Places() if native else Slots(memory)
        self._parts: Mapping[str, Part] = model.parts
        self._layers: dict[str, Any] = {}
        self._devices: dict[str, torch.device] = {}
        self._asked: tuple[list[Hashable], int] | None = None

    def select(self, rows: Sequence[Hashable], pool: Mapping[Any, Weights], width: int = 1) -> None:
        """Name the adapter of each row of the next forward passes, a key of `pool`; an empty one is the base.

        They have `width` tokens each.
        """
        asked = [*rows], width
        if asked == self._asked:
            return
        self._asked = None
        adapters = [pool[key] for key in {*rows} if key]
        for weights in adapters:
            self._meet(weights)
        plan = self._products.plan(rows, pool, width)
        names = set[str]().union(*(weights.layers for weights in adapters))
        for layer in self._layers.values():
            layer.follow(None if names.isdisjoint(layer.parts) else plan)
        self._asked = asked

    def device(self, name: str) -> torch.device:
        """Where the weights for a layer of the checkpoint belong."""
        path = self._path(name)
        if path not in self._devices:  # asked for by each adapter that is read
            layer = self._model.get_submodule(path)
            self._devices[path] = next((t.device for t in (*layer.parameters(), *layer.buffers())), self._model.device)
        return self._devices[path]

    @torch.no_grad()
    def scale(self, name: str, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor) -> Scale:
        """DoRA's gain m / ||W + B A|| of a layer of the checkpoint, over each row of weights, and what keeps its bias.

        a: (rank, in), b: (rank, out), with the scaling, magnitude: (out,). arXiv:2402.09353, equation 5.
        """
        layer: Any = self._model.get_submodule(self._path(name))
        part = self._parts.get(name, Part("", 0, b.shape[1]))
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        weight = weight[part.first : part.last].float()
        changed = torch.addmm(weight, b.T.to(weight), a.to(weight))
        gain = magnitude.to(weight) / torch.linalg.vector_norm(changed, dim=1)
        bias = 0 if layer.bias is None else layer.bias[part.first : part.last]
        return Scale(gain, (1 - gain) * bias)

    def shape(self, name: str) -> tuple[int, int] | None:
        """How many values a layer of the checkpoint puts out, and takes, however its weight is packed.

        None where it does not say.
        """
        layer: Any = self._model.get_submodule(self._path(name))
        part = self._parts.get(name)
        outputs = part.last - part.first if part else getattr(layer, "out_features", None)
        return (outputs, layer.in_features) if outputs else None

    @property
    def bytes(self) -> int:
        """The memory that copies of adapters take, beside the adapters."""
        return self._products.bytes

    def _meet(self, weights: Weights) -> None:
        """Hook into layers that no adapter before had weights for."""
        for name, (a, b) in weights.layers.items():
            path = self._path(name)
            if path in self._layers:
                continue
            parts = {n: p for n, p in self._parts.items() if p.path == path} or {name: Part(path, 0, b.shape[1])}
            self._layers[path] = layer = self._products.layer(parts, a)
            module = self._model.get_submodule(path)
            if isinstance(module, Projection):
                module.adapt_by(layer)
            else:
                module.register_forward_hook(_Hook(layer))

    def _path(self, name: str) -> str:
        return self._parts[name].path if name in self._parts else name


class _Hook:
    """What `nn.Module.register_forward_hook` takes."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._layer.add(inputs[0], output)
