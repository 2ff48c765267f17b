"""AWQ (arXiv:2306.00978): columns with large activations are scaled up before rounding; zero points, GEMM layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from export import calibrated


def quantize(
    source: Path,
    out: Path,
    blocks: Sequence[Sequence[int]],
    progress: Callable[[float, float, str], None],
    *,
    bits: int,
    group_size: int,
) -> None:
    """Write the model in `source` to `out` in the AWQ format, calibrated on `blocks` (N, T) of token ids."""
    import torch
    from gptqmodel import BACKEND, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    # without sym=False the format has no zero points
    config = QuantizeConfig(
        bits=bits, group_size=group_size, quant_method=METHOD.AWQ, format=FORMAT.GEMM, sym=False, **calibrated.COMMON
    )
    # the automatic choice asks for CUDA
    backend = BACKEND.AUTO if torch.cuda.is_available() else BACKEND.AWQ_TORCH
    calibrated.quantize(source, out, config, blocks, progress, backend=backend)
