"""Answers that outlive a kill, for scripts in environments of other programs: it imports nothing of ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any


class Kept:
    """Answers by what was asked, one JSON object a line of `file`, appended as they come.

    Each line of an earlier run is used once: who asks the same twice gets two answers. To be used in a `with`, by any
    threads.
    """

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self._earlier: defaultdict[str, list[Any]] = defaultdict(list)
        lines = file.read_bytes().split(b"\n") if file.is_file() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill cut it short: it is asked again
                found = json.loads(line)
                self._earlier[found["asked"]].append(found["answer"])
        self._file = file.open("ab", buffering=0)
        if lines and lines[-1]:
            self._file.write(b"\n")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, asked: Any) -> Any:
        """An answer to `asked`, a JSON value, that was not taken yet; None where there is none."""
        with self._lock:
            earlier = self._earlier.get(_digest(asked))
            return earlier.pop(0) if earlier else None

    def add(self, asked: Any, answer: Any) -> None:
        """Keep an answer, a JSON value."""
        line = json.dumps({"asked": _digest(asked), "answer": answer}, ensure_ascii=False).encode("utf-8", "replace")
        with self._lock:
            self._file.write(line + b"\n")


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
