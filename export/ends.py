"""The tokens that end an answer: what every exported form of a model says, so that no reader runs on."""

from __future__ import annotations

from pathlib import Path

from export.folder import eos_ids
from suite.chat import Chat, load_tokenizer


def ends(folder: Path, speaker: Path | None = None) -> dict[int, str]:
    """Where a reader of the model in `folder` has to stop: tokens and their texts, the one that ends a turn first.

    They are what the chat template writes after an answer, what generation_config.json or config.json name, and the
    tokenizer's own end of a text. `speaker` is the folder whose tokenizer and template are in force instead of the
    model's, as those of an adapter may be.
    """
    tokenizer = load_tokenizer(speaker or folder)
    turn = Chat(tokenizer).turn_end if tokenizer.chat_template else None
    found = dict.fromkeys([turn, *eos_ids(folder), tokenizer.eos_token_id])
    return {i: tokenizer.decode([i]) for i in found if i is not None}
