"""What is added up while a child's logits are compared with its parent's, probe by probe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from suite.errors import SuiteError

TIE = 0.05
"""Logits that are as good as equal: sums in float16 differ by as much."""
AT_ONCE = 1 << 18
"""Logits that are compared at once: all that is computed of them in double precision stays in a processor's cache."""


@dataclass(frozen=True)
class Probe:
    """`ids` (T,) of a text; those from `answer` on are the parent's own greedy answer to what stands before.

    `same` says whether the child's tokenizer gives these ids too; None where that was not asked.
    """

    name: str
    ids: list[int]
    asks: bool = False
    stops: frozenset[int] = frozenset()
    answer: int = 0
    same: bool | None = None


@dataclass
class Sums:
    """What a comparison adds up over positions; its numbers are explained in `export.parity`."""

    positions: int = 0
    max_dlogit: float = 0.0
    dlogit: float = 0.0
    kl: float = 0.0
    top1: int = 0
    ties: int = 0
    predicted: int = 0
    nll_parent: float = 0.0
    nll_child: float = 0.0
    answers: int = 0
    answered: int = 0
    agreed: int = 0
    equal_answers: int = 0
    other_answer: str = ""
    vocabulary: tuple[int, int] = (0, 0)
    worst: tuple[float, str] = (-1.0, "")

    def add(self, probe: Probe, parent: torch.Tensor, child: torch.Tensor) -> None:
        """Add one probe's logits, (T, V) float32 each; where one has more rows than the other, the common ones count.

        Raises SuiteError when one of the two does not have a token of the probe.
        """
        self.vocabulary = parent.shape[1], child.shape[1]
        common = min(self.vocabulary)
        if max(probe.ids) >= common:
            raise SuiteError(
                f"parent and child have {parent.shape[1]} and {child.shape[1]} tokens in the vocabulary, and "
                f"{probe.name!r} has token {max(probe.ids)}",
                hint="compare a model with what was made of it",
            )
        rows = max(1, AT_ONCE // common)
        kl, chosen, good = [], [], []
        for start in range(0, len(probe.ids), rows):
            before, after = parent[start : start + rows, :common], child[start : start + rows, :common]
            kl.append(self._compare(before, after, torch.tensor(probe.ids[start + 1 : start + rows + 1])))
            chosen.append(after.argmax(-1))
            equal = before.argmax(-1) == chosen[-1]
            good.append(before.gather(-1, chosen[-1].unsqueeze(-1)).squeeze(-1) >= before.amax(-1) - TIE)
            self.top1 += int(equal.sum())
            self.ties += int((good[-1] & ~equal).sum())
        self.positions += len(probe.ids)
        self.kl += torch.cat(kl).sum().item()
        self.worst = max(self.worst, (torch.cat(kl).mean().item(), probe.name))
        if probe.answer:
            self._follow(probe, torch.cat(chosen), torch.cat(good))

    def _follow(self, probe: Probe, chosen: torch.Tensor, good: torch.Tensor) -> None:
        """Add how far the child's own greedy answer would go along with the parent's, which one pass shows.

        `chosen` (T,) is what the child prefers after each token, `good` (T,) whether the parent has that for as good
        as its own: where two tokens are, which of them is said means nothing, and what follows differs with it.
        """
        same = chosen[probe.answer - 1 : -1] == torch.tensor(probe.ids[probe.answer :])
        together = int(same.int().cumprod(0).sum())
        self.answers += 1
        self.answered += len(same)
        self.agreed += together
        if together == len(same) or good[probe.answer - 1 + together]:
            self.equal_answers += 1
        else:
            self.other_answer = self.other_answer or probe.name

    def _compare(self, parent: torch.Tensor, child: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """KL (T,) at each position; what is no number counts as infinitely far."""
        equal = parent == child  # also where both are -inf
        difference = (child - parent).abs().masked_fill(equal, 0).nan_to_num(nan=math.inf)
        self.max_dlogit = max(self.max_dlogit, difference.max().item())
        self.dlogit += difference.mean(-1).sum().item()
        p, q = parent.double().log_softmax(-1), child.double().log_softmax(-1)  # in float32 the KL of equals is not 0
        self.predicted += len(following)
        self.nll_parent -= _of(p, following)
        self.nll_child -= _of(q, following)
        kl = (p.exp() * (p - q)).masked_fill(p == q, 0).sum(-1)
        return kl.clamp_min(0).nan_to_num(nan=math.inf)

    def result(self) -> dict[str, Any]:
        """The means, as JSON values."""
        return {
            "max_dlogit": self.max_dlogit,
            "mean_dlogit": self.dlogit / self.positions,
            "kl": self.kl / self.positions,
            "top1": self.top1 / self.positions,
            "ties": self.ties / self.positions,
            "ppl_parent": _exp(self.nll_parent / self.predicted),
            "ppl_child": _exp(self.nll_child / self.predicted),
            "greedy": self.agreed / self.answered if self.answered else 1.0,
            "greedy_tokens": self.agreed / self.answers if self.answers else 0.0,
            "greedy_equal": self.equal_answers / self.answers if self.answers else 1.0,
            **({"other_answer": self.other_answer} if self.other_answer else {}),
            "positions": self.positions,
            "vocabulary_parent": self.vocabulary[0],
            "vocabulary_child": self.vocabulary[1],
            "worst_kl": self.worst[0],
            "worst_probe": self.worst[1],
        }


def _of(log_p: torch.Tensor, ids: torch.Tensor) -> float:
    """The sum of log probabilities that the first rows (T, V) give to `ids`."""
    return log_p[: len(ids)].gather(-1, ids.unsqueeze(-1)).sum().item()


def _exp(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).exp().item()
