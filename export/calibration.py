"""Calibration samples: conversations drawn by seed, rendered by the model's own chat template, cut to equal blocks.

Equal, because GPTQModel's AWQ uses only the first batch of samples when their lengths differ, and says nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from suite import data
from suite.chat import Chat, Message
from suite.errors import SuiteError

SHORTEST = 11
"""GPTQModel leaves out blocks of fewer tokens."""
FEW = 32
HELD_OUT = 8
"""Conversations left aside, on which the result is compared with its parent."""


@dataclass(frozen=True)
class Drawn:
    """`blocks` (N, T) of token ids; `held_out`: conversations not among them; `warning`: what may be wrong."""

    blocks: list[list[int]]
    conversations: int
    held_out: list[list[Message]]
    warning: str = ""


def draw(model: Path, files: Sequence[Path], fill: Mapping[str, str], samples: int, length: int, seed: int) -> Drawn:
    """Draw `samples` conversations from `files`, joined and cut into blocks of `length` tokens, and hold some out.

    Raises SuiteError when they have too few tokens for one block that can be used.
    """
    chat = Chat.load(model)
    rows = data.Rows()
    for file in files:
        rows.extend(data.read(file, fill))
    conversations = rows.conversations
    random.Random(seed).shuffle(conversations)
    drawn, rest = conversations[:samples], conversations[samples:]
    tokens = [token for row in drawn for token in chat.ids(row.messages, row.tools)]
    if len(tokens) < SHORTEST:
        raise SuiteError("the calibration data has no usable conversation", where=", ".join(map(str, files)))
    size = min(length, len(tokens))
    blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    warning = rows.account()
    if len(drawn) < min(samples, FEW):
        few = f"calibrated on {len(drawn)} conversations only; {FEW} or more give steadier results"
        warning = f"{few}. {warning}".removesuffix(". ")
    return Drawn(blocks, len(drawn), [row.messages for row in rest[:HELD_OUT]], warning)
