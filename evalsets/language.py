"""Which language a text is in: English and Chinese are told by their script."""

from __future__ import annotations

import re
from typing import Literal

Language = Literal["en", "zh"]
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def language_of(*texts: str) -> Language:
    """Chinese if there is a Chinese character in any of them."""
    return "zh" if any(CHINESE.search(text) for text in texts) else "en"
