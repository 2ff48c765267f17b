"""Search for the widths of a quantized model: the smallest within a loss, or the closest within a size.

1. Each group of layers alone is rounded to the nearest of each width, and the model's KL on calibration text is taken.
2. The KL of a mix is predicted as the sum over its groups; all mixes that no other beats come from a knapsack.
3. The chosen mix is made for real and measured on the probes. What that shows, a factor for the KL (GPTQ loses less
   than rounding) and a difference for the bytes (headers), corrects the prediction for the next choice.

So prediction only ranks; that the limit holds is always measured.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div

from export import parity
from export.folder import weight_bytes
from export.quantizers import mixes
from export.quantizers.layers import WHOLE, linear_layers
from export.quantizers.mixes import Mix, Option
from export.quantizers.recipe import Blocks, Progress, Recipe
from export.tensors import read_checkpoint
from suite.errors import SuiteError

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")
SEEN = 2048
"""Calibration tokens on which groups are measured."""
DESCRIBED = 512
"""Bytes that the header of a file takes for the parts of a quantized layer, about."""
ATTEMPTS = 3
"""Models that are made of one family of widths, at most."""


@dataclass(frozen=True)
class Limit:
    """What the model must keep within: KL in nats a token, or bytes of weights; one of the two."""

    kl: float | None = None
    bytes: int | None = None

    def choose(self, front: Sequence[Mix], factor: float, extra: int) -> Mix | None:
        """The best mix that is predicted to hold, with its KL times `factor` and `extra` bytes; None for none."""
        if self.bytes is not None:
            return next((mix for mix in reversed(front) if mix.bytes + extra <= self.bytes), None)
        return next((mix for mix in front if mix.kl * factor <= (self.kl or 0)), None)

    def excess(self, made: Made) -> float:
        """By how much a model is beyond the limit; not positive where it holds."""
        return made.bytes - self.bytes if self.bytes is not None else made.kl - (self.kl or 0)

    def order(self, made: Made) -> tuple[float, float]:
        """Sorts models that hold: by loss under a limit of size, by size under one of loss."""
        return (made.kl, made.bytes) if self.bytes is not None else (made.bytes, made.kl)


@dataclass(frozen=True)
class Made:
    """A model that was made, with its parity record; `mix` are the widths of the groups, with their predicted KL."""

    folder: Path
    recipe: Recipe
    mix: Mix
    bytes: int
    parity: dict[str, Any]

    @property
    def kl(self) -> float:
        """Measured, in nats a token."""
        return float(self.parity["kl"])

    def as_json(self) -> dict[str, Any]:
        """What the record says of it."""
        predicted = {"bits": list(self.mix.bits), "predicted_kl": self.mix.kl}
        return {"method": self.recipe.method, **predicted, "kl": self.kl, "bytes": self.bytes}


@dataclass
class Search:
    """A search over the model in `source`; what `recipe` says besides method and widths holds for all.

    `measure` compares a finished folder with `source`, see `export.parity`. Models are written below `scratch`.
    """

    source: Path
    scratch: Path
    recipe: Recipe
    limit: Limit
    blocks: Blocks
    measure: Callable[[Path], dict[str, Any]]
    progress: Progress

    def run(self, methods: Sequence[str], bits: Collection[int]) -> tuple[Made, dict[str, Any]]:
        """The best model within the limit that `methods` make of layers of `bits`, and how it was found.

        Raises SuiteError where none holds, with the closest that there is.
        """
        families = mixes.families(methods, bits)
        rounded_to = sorted({bits for _, widths in families for bits in widths} - {WHOLE})
        losses = sensitivity(self.source, self.groups, rounded_to, self.recipe.group_size, self.blocks, self.progress)
        fronts = [(method, self._front(method, widths, losses)) for method, widths in families]
        tried: list[Made] = []
        best: Made | None = None
        for method, front in fronts:
            for made in self._attempts(method, front, best):
                tried.append(made)
                if self.limit.excess(made) <= 0 and (best is None or self.limit.order(made) < self.limit.order(best)):
                    kept = self.scratch / "best"
                    shutil.rmtree(kept, ignore_errors=True)
                    best = replace(made, folder=made.folder.rename(kept))
        if best is None:
            raise self._impossible(tried, [front[0].bytes + self.rest for _, front in fronts])
        groups = [
            {"name": name, "layers": len(names), "bits": bits, "kl": {str(b): losses[name, b] for b in rounded_to}}
            for (name, names), bits in zip(self.groups.items(), best.mix.bits, strict=True)
        ]
        return best, {"method": best.recipe.method, "groups": groups, "tried": [made.as_json() for made in tried]}

    @cached_property
    def layers(self) -> dict[str, tuple[int, int]]:
        """All layers that a method may round, with their shapes."""
        return linear_layers(self.source)

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The layers that get one width, by the name of the group."""
        return mixes.group(self.layers)

    @cached_property
    def rest(self) -> int:
        """Bytes of what is not quantized: embeddings, norms, biases, head; and about those of the files' headers."""
        tensors = read_checkpoint(self.source).items()
        weights = sum(t.size for name, t in tensors if name.removesuffix(".weight") not in self.layers)
        return weights + DESCRIBED * len(self.layers)

    def _front(self, method: str, widths: Sequence[int], losses: Mapping[tuple[str, int], float]) -> list[Mix]:
        """The mixes of these widths worth making; one that rounds nothing is none."""
        tensors = read_checkpoint(self.source)

        def option(name: str, bits: int) -> Option:
            sizes = (
                tensors[f"{layer}.weight"].size
                if bits == WHOLE
                else mixes.layer_bytes(method, self.layers[layer], bits, self.recipe.group_size)
                for layer in self.groups[name]
            )
            return Option(bits, sum(sizes), losses.get((name, bits), 0.0))

        found = mixes.front([[option(name, bits) for bits in widths] for name in self.groups])
        return [mix for mix in found if {*mix.bits} != {WHOLE}]

    def _attempts(self, method: str, front: Sequence[Mix], best: Made | None) -> Iterator[Made]:
        """Make and measure what is predicted to be best, until that has been made; at most ATTEMPTS models.

        Under a limit of loss, what would be larger than `best` of the methods before is not worth making.
        """
        factor, extra = 1.0, self.rest
        seen: set[tuple[int, ...]] = set()
        for _ in range(ATTEMPTS):
            mix = self.limit.choose(front, factor, extra)
            if mix is None or mix.bits in seen:
                return
            if best and self.limit.bytes is None and mix.bytes + extra >= best.bytes:
                return
            seen.add(mix.bits)
            recipe = self._recipe(method, mix)
            folder = self.scratch / "attempt"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            recipe.make(self.source, folder, self.blocks, self.progress)
            made = Made(folder, recipe, mix, weight_bytes(folder), self.measure(folder))
            factor, extra = made.kl / mix.kl, made.bytes - mix.bytes
            yield made

    def _recipe(self, method: str, mix: Mix) -> Recipe:
        widths = {name: bits for names, bits in zip(self.groups.values(), mix.bits, strict=True) for name in names}
        common = Counter(bits for bits in widths.values() if bits != WHOLE).most_common(1)[0][0]
        return replace(
            self.recipe,
            method=method,
            bits=common,
            widths={name: bits for name, bits in widths.items() if bits != common},
        )

    def _impossible(self, tried: Sequence[Made], smallest: Sequence[int]) -> SuiteError:
        if not tried:
            least = f'the smallest takes about max_bytes = "{-(-min(smallest) // 10**4) / 100:.2f}MB"'
            hint = f"{least}; fewer bits or a larger group_size make smaller ones"
            return SuiteError("no mix of widths is that small", where="search", hint=hint)
        closest = min(tried, key=self.limit.excess)
        reached = f"KL {closest.kl:.2g} at {closest.bytes / 1e6:.2f} MB ({closest.recipe.method})"
        return SuiteError(f"no model that was made keeps within the limit; the closest: {reached}", where="search")


@torch.inference_mode()
def sensitivity(
    source: Path,
    groups: Mapping[str, Sequence[str]],
    widths: Sequence[int],
    group_size: int,
    blocks: Blocks,
    progress: Progress,
) -> dict[tuple[str, int], float]:
    """KL(model || model with one group rounded) in nats a token on the first of `blocks`, by group and width."""
    rows = [torch.tensor([block]) for block in blocks[: max(1, SEEN // len(blocks[0]))]]
    model = parity.load(source, dtype=torch.float32 if parity.fits(source) else "auto")
    tokens, total = sum(row.numel() for row in rows), len(groups) * len(widths)
    found: dict[tuple[str, int], float] = {}

    def answers(row: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=row.to(model.device), use_cache=False).logits
        return logits[0].float().log_softmax(-1).cpu()  # (T, V)

    with TemporaryDirectory() as waiting:
        files = [Path(waiting) / f"{i}.npy" for i in range(len(rows))]
        for file, row in zip(files, rows, strict=True):
            np.save(file, answers(row).numpy())
        for name, layers in groups.items():
            weights = [_weight(model, layer) for layer in layers]
            before = [weight.clone() for weight in weights]
            for bits in widths:
                for weight, given in zip(weights, before, strict=True):
                    weight.copy_(rounded(given, bits, group_size))
                losses = (
                    kl_div(answers(row), torch.from_numpy(np.load(file)), log_target=True, reduction="sum")
                    for file, row in zip(files, rows, strict=True)
                )
                found[name, bits] = max(0.0, sum(loss.item() for loss in losses) / tokens)
                progress(len(found), total, "search")
            for weight, given in zip(weights, before, strict=True):
                weight.copy_(given)
    return found


def _weight(model: torch.nn.Module, layer: str) -> torch.Tensor:
    """The matrix (O, I) of a layer that the checkpoint names; in memory those of all experts are one tensor."""
    if not (expert := EXPERT.fullmatch(layer)):
        return model.get_parameter(f"{layer}.weight")
    stem, number, part = expert[1], int(expert[2]), expert[3]
    if part == "down":
        return model.get_parameter(f"{stem}.down_proj")[number]
    gate, up = model.get_parameter(f"{stem}.gate_up_proj")[number].chunk(2)
    return gate if part == "gate" else up


def rounded(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """`weight` (O, I), each group of a row at the nearest of 2^bits values between its least and its largest."""
    groups = weight.float().reshape(len(weight), -1, group_size if group_size > 0 else weight.shape[1])
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    nearest: torch.Tensor = ((groups - low) / step).round() * step + low
    return nearest.reshape_as(weight).to(weight.dtype)


def table(account: Mapping[str, Any]) -> str:
    """The account of a search as Markdown: what each group costs at each width, what was chosen, what was made."""
    widths = list(account["groups"][0]["kl"])
    lines = [
        "# Widths by measurement",
        "",
        f"Method: {account['method']}.",
        "KL to the parent in nats a token, with one group of layers alone rounded to the nearest value of each width:",
        "",
        f"| group | layers | {' | '.join(f'{bits} bits' for bits in widths)} | chosen |",
        f"|---|---|{'---|' * len(widths)}---|",
    ]
    for group in account["groups"]:
        losses = " | ".join(f"{group['kl'][bits]:.2g}" for bits in widths)
        lines.append(f"| {group['name']} | {group['layers']} | {losses} | {group['bits']} |")
    lines += ["", "Models that were made, and measured on the probes:", ""]
    lines += ["| method | bits of the groups | predicted KL | KL | MB |", "|---|---|---|---|---|"]
    for made in account["tried"]:
        bits = " ".join(map(str, made["bits"]))
        size = made["bytes"] / 1e6
        lines.append(f"| {made['method']} | {bits} | {made['predicted_kl']:.2g} | {made['kl']:.2g} | {size:.2f} |")
    return "\n".join(lines) + "\n"
