"""Calibration samples: conversations drawn by seed, rendered by the model's own chat template."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from suite import data
from suite.chat import Chat, Message
from suite.errors import SuiteError

SHORTEST = 11
"""GPTQModel leaves out samples of fewer tokens."""
FEW = 32
HELD_OUT = 8
"""Conversations left aside, on which the result is compared with its parent."""


@dataclass(frozen=True)
class Drawn:
    """`ids`: token ids of each sample; `held_out`: conversations that are not among them; `warning`: what may be wrong."""

    ids: list[list[int]]
    held_out: list[list[Message]]
    warning: str = ""


def draw(
    model: Path, files: Sequence[Path], fill: Mapping[str, str], samples: int, length: int, seed: int
) -> Drawn:
    """Draw `samples` conversations of up to `length` tokens from `files`, and some more to hold out.

    Raises SuiteError when there is none that is long enough.
    """
    chat = Chat.load(model)
    rows = data.Rows()
    for file in files:
        rows.extend(data.read(file, fill))
    conversations = rows.conversations
    random.Random(seed).shuffle(conversations)
    left = max(0, min(HELD_OUT, len(conversations) - samples))
    held_out, conversations = conversations[:left], conversations[left:]
    ids: list[list[int]] = []
    for row in conversations:
        tokens = chat.ids(row.messages, row.tools)[:length]
        if len(tokens) >= SHORTEST:
            ids.append(tokens)
        if len(ids) == samples:
            break
    if not ids:
        raise SuiteError(f"no conversation has {SHORTEST} tokens or more", where=", ".join(map(str, files)))
    warning = rows.account()
    if len(ids) < min(samples, FEW):
        warning = f"calibrated on {len(ids)} conversations only; {FEW} or more give steadier results. {warning}".rstrip()
    return Drawn(ids, [c.messages for c in held_out if not c.tools], warning)
