"""What tells one evaluation from another: which model was asked."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

CLOCK = 60.0
"""Seconds within which a model's `created` is the time of the request, as some endpoints have it, and tells nothing."""


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
