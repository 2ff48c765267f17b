"""Does a loaded model give in the engine's batches what it gives alone? Asked once, before it serves.

Most of what transformers has does. But a model may compute its own masks from the length of the longest row, keep a
state that no `Cache` holds, or look at what comes later: it would answer, and wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from serve.folders import OTHERS
from serve.torch.cache import SlotCache
from suite.errors import SuiteError

ROWS = [7, 5, 3, 6, 4, 8], [4, 9, 5, 7]
"""Two prompts of token ids, of different lengths."""
STEPS = (3, 2), (2, 1), (1, 1)
"""How many tokens of each are read at once: from the start on, behind what was read, and as while decoding."""
TOLERANCE, ROUGH = 0.002, 0.2
"""How large differences of logits may be, as a share of their size; in short types, or where weights are packed."""

RULED_OUT = 1e4
"""Some models give tokens that they never generate the least logit there is."""


def alone(model: Any) -> torch.Tensor:
    """Logits (N, V) at all places of the rows, each read by itself, at once, and without a cache.

    Raises SuiteError for a model that cannot even do that.
    """
    with _refusing(model), torch.no_grad():
        rows = [torch.tensor([row], device=model.device) for row in ROWS]
        return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in rows])


def check(model: Any, wanted: torch.Tensor, rough: bool) -> int:
    """Compare with what `alone` gave; returns the bytes that keys and values of a token take.

    Raises SuiteError where the difference is more than `TOLERANCE`, or `ROUGH`.
    """
    cache = SlotCache(0, 1)
    with _refusing(model):
        given = _together(model, cache)
        possible = wanted.abs().amax(0) < RULED_OUT
        given, wanted = given[:, possible].float(), wanted[:, possible].float()
        centred = wanted - wanted.mean(-1, keepdim=True)  # what all tokens have in common says nothing
        difference = float((given - wanted).norm() / centred.norm())
        if not difference <= (ROUGH if rough else TOLERANCE):
            raise ValueError(
                f"its answers in a batch are not those that it gives alone: logits differ by {difference:.1%}"
            )
    return cache.token_bytes


@contextmanager
def _refusing(model: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise SuiteError(
            f"{type(model).__name__} cannot be served in batches: {error}",
            where=model.name_or_path,
            hint=OTHERS,
        ) from error


def _together(model: Any, cache: SlotCache) -> torch.Tensor:
    """The same logits, of a batch that is read in steps."""
    found: list[list[torch.Tensor]] = [[] for _ in ROWS]
    starts = [0] * len(ROWS)
    cache.fit(len(ROWS), max(map(len, ROWS)))
    with torch.no_grad():
        for counts in STEPS:
            width = max(counts)
            ids = [row[a : a + n] + [0] * (width - n) for row, a, n in zip(ROWS, starts, counts, strict=True)]
            cache.begin(0, starts, width, model.device)
            logits = model(
                input_ids=torch.tensor(ids, device=model.device),
                position_ids=cache.positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
            for row, count in enumerate(counts):
                found[row].append(logits[row, :count])
                starts[row] += count
    return torch.cat([logits for row in found for logits in row])
