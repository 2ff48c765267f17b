"""Several adapters in one model: how their changes of a weight become one change, in constant memory.

    sum     the weighted sum of the changes, as in task arithmetic (arXiv:2212.04089)
    ties    trim each change to its largest entries, elect a sign per entry, average those that agree (arXiv:2306.01708)
    dare    drop entries of each change at random, rescale the rest, and sum (arXiv:2311.03099)

All three act on the changes of each weight as a whole, not on the factors A and B.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from export.folder import write_json
from export.lora.adapter import Adapter, Patch
from export.lora.arithmetic import Change, load, read_rows
from export.lora.fit import EMBEDDINGS, Combination
from export.tensors import Tensor
from export.writer import Source

Floats = npt.NDArray[np.float32]
Magnitudes = Callable[[], Iterator[Floats]]
LOW_BITS = 16
LANES = 8
"""Numbers of 32 bits that one step of the Philox counter gives."""


class Combined:
    """The change that several adapters, with their positions, make to consecutive rows of the weight `base`."""

    def __init__(self, base: Tensor, changes: Sequence[tuple[int, Change]], how: Combination, source: Source) -> None:
        self.base, self.changes, self.how, self.source = base, changes, how, source
        self.thresholds = [self._threshold(change) for _, change in changes] if how.method == "ties" else []

    def __call__(self, weight: torch.Tensor, first: int) -> None:
        """Change `weight` (n, columns), float32, in place; its rows are `first` and those after it."""
        deltas = [(self.how.weights[i], change.delta(weight, first)) for i, change in self.changes]
        if self.how.method == "ties":
            for (_, delta), threshold in zip(deltas, self.thresholds, strict=True):
                delta.mul_(delta.abs() >= threshold)
            weight.add_(elect(deltas))
            return
        if self.how.method == "dare":
            for (i, _), (_, delta) in zip(self.changes, deltas, strict=True):
                kept = keep(self.how, i, self.base.name, first * weight.shape[1], delta.numel())
                delta.mul_(torch.from_numpy(kept).view_as(delta)).div_(self.how.density)
        for factor, delta in deltas:
            weight.add_(delta, alpha=factor)

    def _threshold(self, change: Change) -> float:
        def magnitudes() -> Iterator[Floats]:
            for first, rows in read_rows(self.base, self.source):
                yield change.delta(rows, first).abs_().numpy()

        return threshold(magnitudes, self.how.density)


def threshold(magnitudes: Magnitudes, density: float) -> float:
    """The smallest of the largest `density` of all numbers that `magnitudes` gives, each time it is called.

    Floats that are not negative are ordered as their bits are, so two histograms find it: of the upper halves of the
    bits, and of the lower halves of the numbers in the bin that holds it.
    """
    counts = np.zeros(1 << LOW_BITS, np.int64)
    for block in magnitudes():
        counts += np.bincount(_bits(block) >> LOW_BITS, minlength=len(counts))
    wanted = max(1, round(density * int(counts.sum())))
    upper, above = _bin(counts, wanted)
    counts = np.zeros(1 << LOW_BITS, np.int64)
    for block in magnitudes():
        bits = _bits(block)
        inside = bits[bits >> LOW_BITS == upper] & ((1 << LOW_BITS) - 1)
        counts += np.bincount(inside, minlength=len(counts))
    lower, _ = _bin(counts, wanted - above)
    return float(np.array(upper << LOW_BITS | lower, np.uint32).view(np.float32))


def elect(deltas: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """The weighted mean of the entries that have the sign of the weighted sum (arXiv:2306.01708, algorithm 1)."""
    total = torch.stack([factor * delta for factor, delta in deltas]).sum(0)
    sign = torch.sign(total)
    merged, shares = torch.zeros_like(total), torch.zeros_like(total)
    for factor, delta in deltas:
        agrees = (torch.sign(delta) == sign) & (sign != 0)
        merged.add_(delta * agrees, alpha=factor)
        shares.add_(agrees, alpha=factor)
    return merged.div_(shares.clamp_min_(torch.finfo(shares.dtype).tiny))


def keep(how: Combination, adapter: int, name: str, first: int, count: int) -> npt.NDArray[np.bool_]:
    """Which of `count` entries from `first` of a weight are kept: each is decided by its own place and the seed."""
    key = hashlib.sha256(f"{how.seed}/{adapter}/{name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    generator.advance(first // LANES)
    skipped = first % LANES
    drawn = generator.random_raw(-(-(skipped + count) // 2)).view(np.uint32)[skipped : skipped + count]
    kept: npt.NDArray[np.bool_] = drawn < how.density * 2.0**32
    return kept


def as_one(adapters: Sequence[Adapter], how: Combination, folder: Path, source: Source) -> Path | None:
    """Write the weighted sum of LoRA adapters as one adapter: their factors side by side; None for what is more.

    peft can be asked with it, which has no sum of adapters with weights of its own.
    """
    patches = [patch for adapter in adapters for patch in adapter.patches.values()]
    plain = all(
        p.lora and p == Patch(lora=p.lora) and not p.lora.magnitude and len(p.lora.a.shape) == 2 for p in patches
    )
    if how.method != "sum" or not plain or any(a.config.get("target_parameters") or a.tied for a in adapters):
        return None
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name in sorted({name for adapter in adapters for name in adapter.loras}):
        pairs = [(w, a.loras[name]) for w, a in zip(how.weights, adapters, strict=True) if name in a.loras]
        module, embedding = name.removesuffix(".weight"), name.endswith(EMBEDDINGS)
        part = "lora_embedding_{}" if embedding else "lora_{}.weight"
        key = f"base_model.model.{module}.{part}"
        tensors[key.format("A")] = torch.cat([load(lora.a, source) for _, lora in pairs])
        tensors[key.format("B")] = torch.cat([load(lora.b, source) * (w * lora.scale) for w, lora in pairs], dim=1)
        ranks[module] = len(tensors[key.format("A")])
    config = {
        **{key: adapters[0].config.get(key) for key in ("peft_type", "task_type", "fan_in_fan_out")},
        **{"r": 1, "lora_alpha": 1, "target_modules": sorted(ranks), "rank_pattern": ranks, "alpha_pattern": ranks},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config)
    return folder


def _bits(block: Floats) -> npt.NDArray[np.uint32]:
    return block.reshape(-1).view(np.uint32)


def _bin(counts: npt.NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th largest, and how many lie above it."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    return len(counts) - 1 - place, int(above[place] - counts[::-1][place])
