"""What tells one evaluation from another: which model was asked, and how what it said was read and scored."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

CLOCK = 60.0
"""Seconds within which a model's `created` is the time of the request, as some endpoints have it, and tells nothing."""
SCORING = (
    "aside.py", "ask.py", "external/*.py", "extract/*.py", "intervals.py", "judge.py", "kinds/*.py", "language.py",
    "metrics/*.py", "score.py", "sets/*.py", "statistics.py",
)  # fmt: skip
"""The parts of this package that decide what is asked and what a reply to it is worth."""


def identity(root: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a model from others: of a server of ours the files that it serves, else its address and its card.

    `root` is the address, `card` what it says of the model. What that leaves open nobody knows: other weights under the
    same name and date look like the same model.
    """
    if known := card.get("fingerprint"):
        return {"fingerprint": known}
    said = {name: value for name, value in card.items() if isinstance(value, str | int | float)}
    created = said.get("created")
    if isinstance(created, int | float) and abs(time.time() - created) < CLOCK:
        del said["created"]
    return {**said, "url": root}


def word(value: Any) -> str:
    """Sixteen hex digits for a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


@cache
def scoring() -> str:
    """Sixteen hex digits for the code that scores: by other code the same replies may have other scores."""
    package = Path(__file__).parent
    files = (file for pattern in SCORING for file in package.glob(pattern))
    return word({file.relative_to(package).as_posix(): file.read_text("utf-8") for file in files})
