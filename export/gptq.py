"""GPTQ (arXiv:2210.17323): columns are rounded one by one, each error spread over those that are not yet."""

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
    desc_act: bool,
    sym: bool,
) -> None:
    """Write the model in `source` to `out` in the GPTQ format, calibrated on `blocks` (N, T) of token ids."""
    from gptqmodel import QuantizeConfig

    config = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        desc_act=desc_act,
        sym=sym,
        act_group_aware=None if group_size > 0 else False,  # the default asks for groups
        **calibrated.COMMON,
    )
    calibrated.quantize(source, out, config, blocks, progress)
