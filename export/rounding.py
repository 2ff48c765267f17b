"""What rounding weights to their type costs a model's answers: measured on the model itself, not assumed.

A merged weight is the sum of base and change, moved to the nearest number of its type: by half a step at most. Moving
it once more, at random and about as far, costs about as much; so what a correct merge may cost is known for this model,
these weights and this type, and what costs several times more is no rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from export.lora.arithmetic import DTYPES
from export.streaming import Checkpoint, Streamed
from export.tensors import read_checkpoint

AT_ONCE = 1 << 20
"""Numbers that are moved at once."""


def rounded_again(model: Any, folder: Path, changed: Collection[str]) -> Any:
    """`model`, of the checkpoint in `folder`, with what is made of the tensors called `changed` moved at random, each
    time the same.

    A model in memory is changed in place, a streamed one whenever it reads a weight.
    """
    streamed = isinstance(model, Streamed)
    checkpoint = model.checkpoint if streamed else Checkpoint(model, read_checkpoint(folder), str(folder))
    steps = {}
    for name in checkpoint.maker:
        types = [tensor.dtype for _, tensor in checkpoint.parts[checkpoint.maker[name]] if tensor.name in changed]
        if types and name == checkpoint.origin[name]:
            steps[name] = max(torch.finfo(DTYPES[dtype]).eps for dtype in types)

    def move(name: str, weight: torch.Tensor) -> None:
        if name in steps:
            _move(weight, steps[name], name)

    if streamed:
        checkpoint.adjust = move
    else:
        for name, weight in model.state_dict().items():
            move(name, weight)
    return model


def _move(weight: torch.Tensor, step: float, name: str) -> None:
    """Change each number in place by up to half of `step` times itself: half a step of its type or more, a whole one at
    most, as it lies between two powers of two."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    generator = torch.Generator(weight.device).manual_seed(seed)
    for part in torch.split(weight, max(1, AT_ONCE // max(1, weight[0].numel()))):
        noise = torch.rand(part.shape, generator=generator, device=part.device).sub_(0.5)
        part.addcmul_(part, noise, value=step)
