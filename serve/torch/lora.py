"""Many LoRA adapters in one forward pass: rows of the base and of any adapters mixed in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from serve.folders import AdapterFolder
from serve.torch.fused import Part


class MultiLora:
    """Adds `x A^T B^T * scaling` of each row's adapter to the output of every adapted linear layer.

    The A of all adapters are stacked to one (S, in) matrix and the B, with their scaling, to one (S, out), S being the
    sum of the ranks. So a layer costs two dense matrix products, whatever the mixture:

        y += ((x A^T) * mask) B        x: (B, Q, in), mask: (B, 1, S), 1 where the column is of the row's adapter

    What a mask clears adds exact zeros: a row's result does not depend on its neighbours' adapters. It hooks into the
    layer's output only, so the layer itself may be quantized.
    """

    def __init__(self, model: Any, adapters: Mapping[str, AdapterFolder]) -> None:
        self.names = list(adapters)
        self._mask: torch.Tensor | None = None
        ranks = [folder.rank for folder in adapters.values()]
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.long))
        columns = owner == torch.arange(-1, len(ranks))[:, None]  # (1 + adapters, S), row 0 being the base
        self._columns = columns.to(model.device, model.dtype)
        stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        first = 0
        for folder, rank in zip(adapters.values(), ranks, strict=True):
            self._stack(stacked, folder, first, sum(ranks))
            first += rank
        for path, (a, b) in stacked.items():
            part = model.parts.get(path, Part(path, 0, b.shape[1]))
            layer = model.get_submodule(part.path)
            device = next((t.device for t in (*layer.parameters(), *layer.buffers())), model.device)
            down, up = a.T.contiguous().to(device, model.dtype), b.to(device, model.dtype)
            layer.register_forward_hook(self._hook(down, up, slice(part.first, part.last)))

    def select(self, rows: Sequence[str]) -> None:
        """Name the adapter of each row of the next forward pass; "" is the base."""
        if any(rows):
            index = [self.names.index(name) + 1 if name else 0 for name in rows]
            self._mask = self._columns[index][:, None]
        else:
            self._mask = None

    @staticmethod
    def _stack(
        stacked: dict[str, tuple[torch.Tensor, torch.Tensor]], folder: AdapterFolder, first: int, total: int
    ) -> None:
        with safe_open(folder.path / "adapter_model.safetensors", "pt") as file:
            names = {n.removeprefix("base_model.model.").removesuffix(".weight"): n for n in file.keys()}  # noqa: SIM118
            for path, module in folder.modules.items():
                if path not in stacked:
                    stacked[path] = torch.zeros(total, module.inputs), torch.zeros(total, module.outputs)
                a, b = stacked[path]
                rows = slice(first, first + module.rank)
                a[rows] = file.get_tensor(names[f"{path}.lora_A"]).float()
                b[rows] = file.get_tensor(names[f"{path}.lora_B"]).float().T * module.scaling

    def _hook(self, a: torch.Tensor, b: torch.Tensor, columns: slice) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self._mask is None:
                return None
            x, mask = inputs[0].to(a.dtype), self._mask
            if x.dim() == 2:  # (B * Q, in), as mixture-of-experts layers flatten it
                mask = mask.expand(-1, len(x) // len(mask), -1).flatten(0, 1)
            low = (x @ a) * mask
            output.flatten(0, -2)[:, columns].addmm_(low.view(-1, b.shape[0]), b)
            return output

        return add
