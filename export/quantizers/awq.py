"""AWQ (arXiv:2306.00978): columns with large activations are scaled up before rounding; zero points, GEMM layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from export.quantizers import calibrated
from export.quantizers.layers import pattern
from export.quantizers.recipe import Blocks, Progress, Recipe

STEPS, SMALLEST = 20, 0.5
"""Clipping bounds that are tried: in steps of 1/20 of the largest weight, down to half of it."""


def quantize(source: Path, out: Path, recipe: Recipe, blocks: Blocks, progress: Progress) -> None:
    """Write the model in `source` to `out` in the AWQ format, calibrated on `blocks` (N, T) of token ids."""
    from gptqmodel import BACKEND, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    config = QuantizeConfig(
        bits=recipe.bits,
        group_size=recipe.group_size,
        quant_method=METHOD.AWQ,
        format=FORMAT.GEMM,
        sym=False,  # else the format has no zero points
        dynamic={f"-:{pattern(recipe.whole)}": {}} if recipe.whole else None,
        **calibrated.COMMON,
    )
    # the automatic choice asks for CUDA
    backend = BACKEND.AUTO if torch.cuda.is_available() else BACKEND.AWQ_TORCH
    with _clipping_by_gram():
        calibrated.quantize(source, out, config, blocks, progress, backend=backend)
    if recipe.whole:
        calibrated.describe(out, modules_to_not_convert=recipe.whole)


@contextmanager
def _clipping_by_gram() -> Iterator[None]:
    """Let GPTQModel search its clipping bounds with `best_clip`.

    Its own search forms the product of every token with every weight and every bound before it sums them, which is
    most of the time that AWQ takes on a CPU.
    """
    from gptqmodel.looper.awq_processor import AWQProcessor

    own = AWQProcessor._compute_best_clip

    def search(processor: Any, weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        size = processor.qcfg.group_size if processor.qcfg.group_size > 0 else weight.shape[1]
        return best_clip(weight, features, size, processor._pseudo_quantize_tensor_into)

    AWQProcessor._compute_best_clip = search
    try:
        yield
    finally:
        AWQProcessor._compute_best_clip = own


@torch.inference_mode()
def best_clip(
    weight: torch.Tensor,
    features: torch.Tensor,
    size: int,
    round_into: Callable[[torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """The bound (O, G, 1) at which to clip each group of `size` weights before rounding, for the least output error.

    `weight` is (O, G * size), `features` are the layer's inputs (..., G * size), `round_into(given, result)` rounds.
    The mean squared error of x @ (q - w) over inputs x is (q - w) C (q - w), where C = mean of x x': one matrix
    product for each bound, however many inputs there are.
    """
    w = weight.reshape(len(weight), -1, size)  # (O, G, S)
    x = features.reshape(-1, w.shape[1], size).to(weight.device).float().transpose(0, 1)  # (G, N, S)
    gram = x.transpose(1, 2) @ x / x.shape[1]  # (G, S, S)
    largest = w.abs().amax(-1, keepdim=True)  # (O, G, 1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf, dtype=torch.float32)
    rounded = torch.empty_like(w)
    for step in range(int(STEPS * SMALLEST)):
        bound = largest * (1 - step / STEPS)
        round_into(w.clamp(-bound, bound), rounded)
        change = (rounded - w).float().transpose(0, 1)  # (G, O, S)
        error = (change @ gram * change).sum(-1).T.unsqueeze(-1)  # (O, G, 1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, bound, best)
    return best
