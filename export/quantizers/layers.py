"""The linear layers of a checkpoint, by their names: read from the headers of its files, without torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from export.tensors import read_checkpoint
from suite.errors import SuiteError, near

WHOLE = 16
"""The width of a layer that is not quantized."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM and LMDeploy join into one layer when they load a model: its parts must have one width."""
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Layers that choose experts, which no quantizer touches."""
IN_A_BLOCK = re.compile(r"\.\d+\.")

Shape = tuple[int, int]


def linear_layers(folder: Path) -> dict[str, Shape]:
    """The layers that a quantizer may replace, as (outputs, inputs): all matrices of the transformer blocks."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in sorted(read_checkpoint(folder).items())
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and IN_A_BLOCK.search(name)
        and name.split(".")[-2] not in ROUTERS
    }


def kept(layers: Collection[str], rules: Mapping[str, int]) -> dict[str, int]:
    """The width of each layer that one of `rules` (regular expression: bits) finds; the first that does counts.

    Raises SuiteError for a rule that is no regular expression, or finds no layer.
    """
    found: dict[str, int] = {}
    for rule, bits in rules.items():
        try:
            matching = [name for name in layers if re.search(rule, name)]
        except re.error as error:
            raise SuiteError(f"'{rule}' is no regular expression: {error}", where="keep") from None
        if not matching:
            ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in layers)
            raise SuiteError(f"'{rule}' matches no layer", where="keep", hint=near(rule, [*ends, *layers][:64]))
        for name in matching:
            found.setdefault(name, bits)
    return found


def torn(layers: Collection[str], widths: Mapping[str, int]) -> list[str]:
    """The layers of which some parts have another width than the others, in the names of an engine that fuses them."""
    found = []
    for whole, parts in FUSED.items():
        for name in layers:
            stem, _, last = name.rpartition(".")
            if last == parts[0] and len({widths.get(f"{stem}.{part}") for part in parts}) > 1:
                found.append(f"{stem}.{whole}")
    return found


def untouched(layers: Collection[str], made: Path) -> list[str]:
    """Those of `layers` that the quantized model in `made` holds as numbers, which a method does not know to round."""
    stored = read_checkpoint(made)
    return [n for n in layers if (tensor := stored.get(f"{n}.weight")) and tensor.dtype in ("F32", "F16", "BF16")]


def pattern(names: Collection[str]) -> str:
    """A regular expression for exactly these layers, and for those into which tools fuse them, or take them apart."""
    stems = {name.rpartition(".")[0] for name in names}
    joined = [
        f"{stem}.{whole}"
        for whole, parts in FUSED.items()
        for stem in stems
        if {f"{stem}.{p}" for p in parts} <= {*names}
    ]
    parts = [
        f"{stem}.{part}" for stem, _, last in (name.rpartition(".") for name in names) for part in FUSED.get(last, ())
    ]
    return "^(?:" + "|".join(map(re.escape, sorted({*names, *joined, *parts}))) + ")$"
