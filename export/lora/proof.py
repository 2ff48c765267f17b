"""The proof of a merge: the merged model answers as base plus adapter do, but for rounding.

What rounding may cost is measured on the merged model (`export.rounding`), and the merge must be much nearer to base
plus adapter than the base alone is: a merge that lost the adapter, or a part of it, is neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export import parity
from export.folder import read_config
from export.limits import Limits
from export.lora.fit import Edit
from export.rounding import rounded_again
from export.sums import Probe
from export.tensors import read_checkpoint
from suite.errors import SuiteError

Progress = Callable[[float, float, str], None]
ROUNDINGS = 4.0
"""How many times what rounding costs at random is still rounding; seen were 0.5 to 0.9 of it, on dense models."""
ARITHMETIC = Limits(kl=1e-6, max_dlogit=1e-3)
"""What float32 itself may cost: base and adapter are multiplied apart, and added."""
MIXED = Limits(kl=1e-3)
"""What a mixture of experts may cost: rounding may choose another that is almost as good, at any position."""
LOST = 0.5
"""The share of the adapter's effect that may be missing, where rounding is about as large as the effect."""
FAINT = 1e4
"""Below so many times the KL of rounding at random an adapter may be about a step of the weights' type. Then rounding
takes from each number a part of the adapter's change, all in its direction, which costs more than the same at random:
on nano 6 times as much, and a quarter of the effect, of a change of half a step; more, the wider the weights for their
rank."""
NOTHING = 1e-9
"""An effect, as KL, that cannot be told from none."""
WRONG = "the merged weights are not those of base and adapter: please report this"


@dataclass(frozen=True)
class Merged:
    """A merge that was written to `out`, and what it was made of."""

    out: Path
    base: Path
    edits: Sequence[Edit]

    @property
    def tokens(self) -> int | None:
        """How many tokens there are, where the adapter brought new ones."""
        rows = {e.target.name: e.target.shape[0] for e in self.edits}
        before = read_checkpoint(self.base).items()
        return next((rows[name] for name, t in before if rows.get(name, t.shape[0]) != t.shape[0]), None)

    @property
    def mixed(self) -> bool:
        """Whether it is a mixture of experts, of which it chooses some for each token."""
        config = read_config(self.base)
        settings = {**config, **(config.get("text_config") or {})}
        return any("experts" in name and isinstance(value, int) and value > 0 for name, value in settings.items())

    @property
    def rounded(self) -> set[str]:
        """The tensors whose numbers were rounded to their type."""
        return {e.target.name for e in self.edits if not e.copied}


def prove(merged: Merged, adapter: Path, probes: Sequence[Probe], progress: Progress) -> dict[str, Any]:
    """Compare the merged model with its base plus `adapter`; raises SuiteError where they differ by more than rounding,
    or as much as without the adapter.

    Beside what `parity.measure` gives: `rounding`, the KL that rounding the merged weights once more costs, and
    `effect`, the KL that leaving the adapter away costs (not where it brings tokens that the base lacks).
    """
    tokens = merged.tokens
    with parity.Interview(probes, 4 - bool(tokens), progress) as interview:
        together = interview.ask(lambda: parity.load(merged.base, adapter, tokens=tokens))
        effect = {} if tokens else {"effect": interview.against(together, lambda: parity.load(merged.base))["kl"]}
        alone = interview.ask(lambda: parity.load(merged.out))
        result = interview.compare(together, alone) | effect | parity.prompts(probes)
        interview.forget(together)
        rounding = interview.against(alone, lambda: rounded_again(parity.load(merged.out), merged.out, merged.rounded))
        result["rounding"] = rounding["kl"]
    if not effect or effect["effect"] > FAINT * rounding["kl"]:
        least = MIXED if merged.mixed else ARITHMETIC
        most = {name: max(getattr(least, name), ROUNDINGS * rounding[name]) for name in ("kl", "max_dlogit")}
        parity.require(result, Limits(**most, cure=WRONG))
    if effect and effect["effect"] > NOTHING and result["kl"] > LOST * effect["effect"]:
        raise SuiteError(
            f"the adapter is lost: base and adapter are {result['kl']:.2g} nats a token (KL) from the merged model, "
            f"and {effect['effect']:.2g} from the base alone; "
            f"worst on {result['worst_probe']!r}: KL {result['worst_kl']:.2g}",
            hint="its change is smaller than a step of the weights' type: train it further, or serve it unmerged",
        )
    return result


def distances(
    merged: Merged, parts: Sequence[tuple[str, Path | None]], probes: Sequence[Probe], progress: Progress
) -> dict[str, Any]:
    """How far the base with each adapter of `parts` (name and folder; None: without any) answers from the merged model.

    There is no model that it should equal, so nothing is required. Returns `{"against": [...]}`: what `parity.measure`
    gives of the merged model and each of them, with its `name`.
    """
    with parity.Interview(probes, 1 + len(parts), progress) as interview:
        own = interview.ask(lambda: parity.load(merged.out))
        against = [
            {"name": name, **interview.against(own, partial(parity.load, merged.base, adapter))}
            for name, adapter in parts
        ]
    return {"against": against, **parity.prompts(probes)}
