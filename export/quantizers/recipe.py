"""How a model is quantized: the method, its widths, and the layers that keep more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from export.quantizers.layers import WHOLE

Progress = Callable[[float, float, str], None]
Blocks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Method:
    """What a method can do: the `bits` of its layers, those that a layer may `keep`, and which module does it.

    The module has `quantize(source, out, recipe, blocks, progress)`. `grouped`: weights share scales by `group_size`;
    `environment`: the one (`suite.envs`) whose interpreter the module needs; `fails_on`: kinds of models, by their
    `model_type`, that its library does not get through.
    """

    module: str
    bits: tuple[int, ...]
    keep: tuple[int, ...] = (WHOLE,)
    calibrated: bool = True
    grouped: bool = True
    environment: str = ""
    fails_on: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "gptq": Method("export.quantizers.gptq", (2, 3, 4, 8), (3, 4, 8, WHOLE)),
    "awq": Method("export.quantizers.awq", (4,), fails_on=("phi3",)),
    "bnb": Method("export.quantizers.bnb", (4, 8), calibrated=False, grouped=False),
    "w4a16": Method("export.quantizers.compressed", (4,), (8, WHOLE), environment="llmcompressor"),
    "w8a8": Method("export.quantizers.compressed", (8,), grouped=False, environment="llmcompressor"),
    "fp8": Method("export.quantizers.compressed", (8,), calibrated=False, grouped=False, environment="llmcompressor"),
}


@dataclass(frozen=True)
class Recipe:
    """The settings of one quantized model; `widths` holds the bits of the layers that differ from `bits`, by name.

    `python` is the interpreter of the method's environment, where it has one.
    """

    method: str
    bits: int
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    format: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    widths: Mapping[str, int] = field(default_factory=dict)
    python: Path | None = None

    @property
    def whole(self) -> list[str]:
        """The layers that are not quantized."""
        return [name for name, bits in self.widths.items() if bits == WHOLE]

    def make(self, source: Path, out: Path, blocks: Blocks, progress: Progress) -> None:
        """Write the model in `source` to `out`, calibrated on `blocks` (N, T) of token ids if the method needs it."""
        import_module(METHODS[self.method].module).quantize(source, out, self, blocks, progress)
