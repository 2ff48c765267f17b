"""GPTQ (arXiv:2210.17323): columns are rounded one by one, each error spread over those that are not yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.quantizers import calibrated
from export.quantizers.layers import WHOLE, linear_layers, pattern
from export.quantizers.recipe import Blocks, Progress, Recipe


def quantize(source: Path, out: Path, recipe: Recipe, blocks: Blocks, progress: Progress) -> None:
    """Write the model in `source` to `out` in the GPTQ format, calibrated on `blocks` (N, T) of token ids."""
    from gptqmodel import QuantizeConfig

    config = QuantizeConfig(
        bits=recipe.bits,
        group_size=recipe.group_size,
        desc_act=recipe.desc_act,
        sym=recipe.sym,
        act_group_aware=None if recipe.group_size > 0 else False,  # the default asks for groups
        dynamic=_rules(recipe) or None,
        **calibrated.COMMON,
    )
    calibrated.quantize(source, out, config, blocks, progress)
    if recipe.whole:
        # transformers does not read the rules
        quantized = [name for name in linear_layers(source) if recipe.widths.get(name) != WHOLE]
        calibrated.describe(out, modules_in_block_to_quantize=[quantized])


def _rules(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The widths as GPTQModel and vLLM read them; every layer is in one rule, for their order may be lost."""
    found = {}
    for bits in sorted({*recipe.widths.values()}):
        names = pattern([name for name, width in recipe.widths.items() if width == bits])
        found.update({f"-:{names}": {}} if bits == WHOLE else {f"+:{names}": {"bits": bits}})
    return found
