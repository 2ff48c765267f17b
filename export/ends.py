"""The tokens that end an answer: what every exported form of a model says, so that no reader runs on."""

from __future__ import annotations

from pathlib import Path

from export.folder import eos_ids
from suite.chat import Chat, load_tokenizer
from suite.errors import SuiteError

_STAND_IN = "QxAnswerQx"


def ends(folder: Path, speaker: Path | None = None) -> dict[int, str]:
    """Where a reader of the model in `folder` has to stop: tokens and their texts, the one that ends a turn first.

    They are what the chat template writes after an answer, what generation_config.json or config.json name, and the
    tokenizer's own end of a text. `speaker` is the folder whose tokenizer and template are in force instead of the
    model's, as those of an adapter may be.
    """
    tokenizer = load_tokenizer(speaker or folder)
    turn = _after_an_answer(Chat(tokenizer)) if tokenizer.chat_template else None
    found = dict.fromkeys([turn, *eos_ids(folder), tokenizer.eos_token_id])
    return {i: tokenizer.decode([i]) for i in found if i is not None}


def _after_an_answer(chat: Chat) -> int | None:
    """The special token that the template writes after an answer; None where it writes none, or refuses to."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _STAND_IN}]
    try:
        after = chat.text(messages).rpartition(_STAND_IN)[2].lstrip()
    except SuiteError:
        return None
    special = {token.content: i for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    fitting = [text for text in special if after.startswith(text)]
    return special[max(fitting, key=len)] if fitting else None
