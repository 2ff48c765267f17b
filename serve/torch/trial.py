"""Does a loaded model give in the engine's batches what it gives alone? Asked once, before it serves.

Most of what transformers has does. But a model may compute its own masks from the length of the longest row, keep a
state that no `Cache` holds, or look at what comes later: it would answer, and wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from serve.folders import OTHERS
from serve.torch.cache import SlotCache
from serve.torch.scheduler import Move, Reading
from suite.errors import SuiteError

ROWS = [7, 5, 3, 6, 4], [4, 9, 5, 7, 3, 8, 6], [8, 4, 6]
"""Prompts of token ids, of different lengths."""
STEPS: Mapping[Reading, list[dict[int, int]]] = {
    "padded": [{0: 3, 1: 2}, {2: 2, 1: 3}, {2: 1, 1: 1, 0: 1}, {1: 1, 0: 1}],
    "even": [{0: 3, 1: 3}, {2: 2, 1: 2}, {2: 1, 1: 1, 0: 1}, {1: 1, 0: 1}],
    "whole": [{0: 3, 1: 3}, {2: 2}, {2: 1, 1: 1, 0: 1}, {1: 1, 0: 1}, {1: 1}, {1: 1}],
}
"""How many tokens of which rows are read at once: from the start on, beside others that go on, and as while decoding.

After the first step the first row moves, and the last one begins where it was."""
TOLERANCE, ROUGH = 0.002, 0.2
"""How large differences of logits may be, as a share of their size; in short types, or where weights are packed."""

RULED_OUT = 1e4
"""Some models give tokens that they never generate the least logit there is."""


class Found(NamedTuple):
    """How a model is served: how its rows are read together, and the bytes that it keeps of a token, and of a row."""

    reading: Reading
    token_bytes: int
    row_bytes: int


def alone(model: Any) -> tuple[torch.Tensor, set[str]]:
    """Logits (N, V) at all places of the rows, each read by itself, at once, and without a cache.

    Beside them the names of all layers that were called and gave one tensor, which can be added to. Raises SuiteError
    for a model that cannot even do that.
    """
    called: set[str] = set()

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            called.update(names[layer])

    names: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        names.setdefault(layer, []).append(name)
    hooks = [layer.register_forward_hook(note) for layer in names]
    with refusing(model), torch.no_grad():
        rows = [torch.tensor([row], device=model.device) for row in ROWS]
        logits = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in rows])
    for hook in hooks:
        hook.remove()
    return logits, called


def check(model: Any, wanted: torch.Tensor, rough: bool) -> Found:
    """Compare with what `alone` gave; returns how it is served.

    Raises SuiteError where the difference is more than `TOLERANCE`, or `ROUGH`.
    """
    with refusing(model):
        reading: Reading = "padded"
        cache = SlotCache(0, 1)
        given = _together(model, cache, reading)
        if cache.states:
            # however little padding mattered now, it did go into the states
            reading = "even" if _goes_on(model) else "whole"
            cache.clear()
            given = _together(model, cache, reading)
        possible = wanted.abs().amax(0) < RULED_OUT
        given, wanted = given[:, possible].float(), wanted[:, possible].float()
        centred = wanted - wanted.mean(-1, keepdim=True)  # what all tokens have in common says nothing
        difference = float((given - wanted).norm() / centred.norm())
        if not difference <= (ROUGH if rough else TOLERANCE):
            raise ValueError(
                f"its answers in a batch are not those that it gives alone: logits differ by {difference:.1%}"
            )
    return Found(reading, cache.token_bytes, cache.states.row_bytes)


@contextmanager
def refusing(model: Any) -> Iterator[None]:
    """Whatever goes wrong within is why this model cannot be served: a SuiteError."""
    try:
        yield
    except Exception as error:
        raise SuiteError(
            f"{type(model).__name__} cannot be served in batches: {error}",
            where=model.name_or_path,
            hint=OTHERS,
        ) from error


def _goes_on(model: Any) -> bool:
    """Whether each sum over what was read still counts when several tokens more are read at once.

    Mamba's first kind begins a new one with them. Rounding could hide that in logits; here it is to the last bit.
    """
    sums: list[list[torch.Tensor]] = []
    for kept in (1, 0):
        cache = SlotCache(0, 1)
        cache.fit(1, len(ROWS[0]))
        for first, last in ((0, 3), (3, 5)):
            cache.begin(0, [first], last - first, model.device)
            _read(model, [ROWS[0][first:last]], cache)
            tensors = [tensor for layer in cache.layers.values() for tensor in layer.recurrent.values()]
            if last == 3:
                for tensor in tensors:
                    tensor.mul_(kept)
        sums.append(tensors)
    return not any(map(torch.equal, *sums))


def _together(model: Any, cache: SlotCache, reading: Reading) -> torch.Tensor:
    """The same logits as `alone`, of a batch that is read in steps."""
    found: list[list[torch.Tensor]] = [[] for _ in ROWS]
    places, read = [0, 1, 0], [0] * len(ROWS)
    cache.fit(len(ROWS), max(map(len, ROWS)))
    for step in STEPS[reading]:
        if read[0] and not places[0]:
            cache.move([Move(0, 2, read[0])])
            places[0] = 2
        width = max(step.values())
        cache.begin(places[next(iter(step))], [read[row] for row in step], width, model.device)
        ids = [ROWS[row][read[row] : read[row] + count] + [0] * (width - count) for row, count in step.items()]
        for row, count, logits in zip(step, step.values(), _read(model, ids, cache), strict=True):
            found[row].append(logits[:count])
            read[row] += count
    return torch.cat([logits for row in found for logits in row])


@torch.no_grad()
def _read(model: Any, ids: list[list[int]], cache: SlotCache) -> torch.Tensor:
    """Logits (B, Q, V) of the tokens that `cache` was told of."""
    logits: torch.Tensor = model(
        input_ids=torch.tensor(ids, device=model.device),
        position_ids=cache.positions,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits
