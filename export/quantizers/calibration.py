"""Calibration samples: conversations drawn by seed, rendered by the model's own chat template, cut to equal blocks.

Equal, because GPTQModel's AWQ uses only the first batch of samples when their lengths differ, and says nothing.

What may be wrong with them is said as warnings: too few conversations, fewer tokens than the widest layer has inputs
(then X X', which GPTQ inverts, is singular: nothing was seen of some directions), none left to measure the result on, a
script that the model was trained on and the samples lack, text that the tokenizer knows no words of. Languages of one
script are not told apart.
"""

from __future__ import annotations

import hashlib
import random
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite import data
from suite.chat import Chat, Message
from suite.errors import SuiteError
from suite.stages import Artifact

SHORTEST = 11
"""GPTQModel leaves out blocks of fewer tokens."""
FEW = 32
HELD_OUT, SHARE = 8, 1 / 8
"""Conversations left aside, on which the result is compared with its parent; of few, at least so large a share."""
PART, TRACE = 0.2, 0.1
"""A script with this share of the training text counts; the samples lack it with less than a tenth of that share."""
SPELT = 0.8
"""Tokens a byte, from which on text is spelt rather than read: known languages take 0.2 to 0.5, single bytes 1."""
READ = 2000
"""Conversations of the training data that are looked at."""


@dataclass(frozen=True)
class Drawn:
    """`blocks` (N, T) of token ids; `held_out`: conversations not among them; `warnings`: what may be wrong.

    `compared`: whether there was training data, with whose languages theirs could be compared.
    """

    blocks: list[list[int]]
    conversations: int
    held_out: list[list[Message]]
    warnings: list[str] = field(default_factory=list)
    compared: bool = False

    @property
    def digest(self) -> str:
        """sha256 of the blocks: equal where calibration saw the same tokens in the same order."""
        seen = hashlib.sha256()
        for block in self.blocks:
            seen.update(struct.pack(f"<{len(block)}I", *block))
        return seen.hexdigest()


def draw(
    model: Path,
    files: Sequence[Path],
    fill: Mapping[str, str],
    samples: int,
    length: int,
    seed: int,
    widest: int = 0,
    trained_on: Sequence[Path] = (),
) -> Drawn:
    """Hold some conversations of `files` out, and draw `samples` others, joined and cut into blocks of `length` tokens.

    `widest` is the number of inputs of the model's widest layer, `trained_on` the data that it was trained on, as far
    as known. Raises SuiteError when the files have too few tokens for one block that can be used.
    """
    chat = Chat.load(model)
    rows = data.Rows()
    for file in files:
        rows.extend(data.read(file, fill))
    conversations = rows.conversations
    random.Random(seed).shuffle(conversations)
    number = len(conversations)
    aside = min(HELD_OUT, max(number - samples, int(SHARE * number)))
    drawn = conversations[: min(samples, number - aside)]
    rest = conversations[len(drawn) :][:aside]
    tokens = [token for row in drawn for token in chat.ids(row.messages, row.tools)]
    if len(tokens) < SHORTEST:
        raise SuiteError("the calibration data has no usable conversation", where=", ".join(map(str, files)))
    size = min(length, len(tokens))
    blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    warnings = [rows.account()]
    if not rest:
        warnings.append("no conversation is left to measure the result on: it is measured on the fixed texts alone")
    if len(drawn) < FEW:
        warnings.append(f"calibrated on {len(drawn)} conversations only; {FEW} or more give steadier results")
    if len(tokens) < widest:
        warnings.append(
            f"calibrated on {len(tokens)} tokens only, fewer than the {widest} inputs of the widest layer: "
            f"raise samples, or give more data"
        )
    learnt = scripts(_texts(_training_rows(trained_on)))
    warnings.append(_language(chat, drawn, learnt))
    held_out = [row.messages for row in rest]
    return Drawn(blocks, len(drawn), held_out, [warning for warning in warnings if warning], bool(learnt))


def training_data(artifact: Artifact) -> list[Path]:
    """The data files in the lineage of `artifact` that training read and that still exist."""
    found: dict[Path, None] = {}
    for entries in artifact.record.get("inputs", {}).values():
        for entry in entries:
            path = Path(entry["path"])
            if entry["type"] == "dataset" and path.is_file():
                found[path] = None
            found.update(dict.fromkeys(training_data(Artifact(path, entry["type"]))))
    return list(found)


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """The share of each writing system among the letters of `texts`, by its Unicode name.

    >>> scripts(["abc 你"])
    {'LATIN': 0.75, 'CJK': 0.25}
    """
    letters: Counter[str] = Counter()
    for text in texts:
        letters.update(filter(str.isalpha, text))
    found: Counter[str] = Counter()
    for letter, count in letters.items():
        found[unicodedata.name(letter, "UNKNOWN").replace("-", " ").split()[0]] += count
    return {name: count / found.total() for name, count in found.most_common()}


def _language(chat: Chat, drawn: Sequence[data.Conversation], learnt: Mapping[str, float]) -> str:
    """A warning where the samples are in other languages than the model: by its tokenizer and the scripts it learnt."""
    texts = list(_texts(drawn))
    tokens = sum(map(len, chat.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    spelt = tokens / max(1, len("".join(texts).encode()))
    if spelt > SPELT:
        return (
            f"the tokenizer spells the calibration data out ({spelt:.2f} tokens a byte), as it does with languages "
            f"that it was not made for: calibrate on what the model will read"
        )
    seen = scripts(texts)
    for name, share in learnt.items():
        if share >= PART and seen.get(name, 0) < TRACE * share:
            return (
                f"{share:.0%} of the letters that the model was trained on are {name}, and "
                f"{seen.get(name, 0):.0%} of those in the calibration data: add rows of that language"
            )
    return ""


def _training_rows(files: Sequence[Path]) -> Iterator[data.Conversation]:
    for file in files:
        try:
            yield from data.read(file).conversations[:READ]
        except SuiteError:  # a template, or texts of another form: nothing is known of them
            continue


def _texts(rows: Iterable[data.Conversation]) -> Iterator[str]:
    return (str(message.get("content") or "") for row in rows for message in row.messages)


def account(drawn: Drawn, files: Sequence[Artifact], length: int, seed: int) -> dict[str, Any]:
    """What calibration saw, for the artifact's record: amounts, and digests instead of paths."""
    return {
        "samples": drawn.conversations,
        "tokens": sum(map(len, drawn.blocks)),
        "length": length,
        "seed": seed,
        "blocks": drawn.digest,
        "files": [file.digest for file in files],
    }
