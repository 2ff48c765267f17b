"""One thing to ask."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from evalsets.language import Language


@dataclass(frozen=True)
class Question:
    """One thing to ask. `messages` is the chat to complete, or empty for a perplexity `text`.

    `stem` is what is asked without prompt, options and examples. `expected` is JSON: the right letters, the number or
    the reference as a text, the calls or checks as a list, whether to refuse; `letters` are those of the `options`,
    e.g. "ABCD".
    """

    id: str
    subset: str
    language: Language
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    expected: Any = ""
    letters: str = ""
    options: tuple[str, ...] = ()
    stem: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def digest(self) -> str:
        """Identity of what is asked and what is right: two reports are compared where these are equal."""
        whole = [self.messages, self.text, self.expected, self.letters, *([self.tools] if self.tools else [])]
        return hashlib.sha256(json.dumps(whole, ensure_ascii=False).encode()).hexdigest()[:16]
