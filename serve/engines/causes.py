"""Why an engine ended, read from its log for a person: the error that came first, its last lines, and the cure."""

from __future__ import annotations

import re
from pathlib import Path

from suite.errors import SuiteError
from suite.processes import tail

KILLED = 137
SIGNALS = {
    KILLED: "it was killed, as the system does where memory runs out",
    132: "it was built for processors with instructions that this one lacks",
    139: "it broke in native code",
}
"""Statuses of programs that a signal has ended."""
TOO_LITTLE = (
    "less than requested memory for kv",  # vLLM on a CPU
    "desired GPU memory utilization",  # vLLM, where somebody else has the rest
    "No available memory for the cache blocks",
    "available KV cache memory",
    "out of memory",
    "OutOfMemoryError",
    "can't allocate memory",
    "Cannot allocate memory",
    "MemoryError",
)
LOWER = "lower --memory or --cache-memory, --max-length or --max-batch, or start fewer replicas"
_ERROR = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception): \S.*)")
_SHOWN = 400
_LOG_ENDS = "log ends with:"


def ended(what: str, log: Path, status: int | None = None) -> SuiteError:
    """The error to raise; `what` says how it ended, e.g. "could not start"."""
    # each life begins with its command
    life, last = log.read_text("utf-8", "replace").rpartition("\n# ")[2].partition("\n")[2], tail(log)
    if status in SIGNALS:
        what = f"{what}: {SIGNALS[status]}"
    first = next((match[1][:_SHOWN] for match in map(_ERROR.search, life.splitlines()) if match), "")
    cause = f":\n  {first}\nits" if first and first not in last else "; its"
    short = status == KILLED or any(sign in life for sign in TOO_LITTLE)
    hint = f"{LOWER}; log: {log}" if short else f"log: {log}"
    return SuiteError(f"the engine {what}{cause} {_LOG_ENDS}\n{last}", hint=hint)


def brief(error: SuiteError) -> str:
    """What clients may know of it: not what a log says, which may name files."""
    return error.message.splitlines()[0].removesuffix(f"; its {_LOG_ENDS}").removesuffix(":")
