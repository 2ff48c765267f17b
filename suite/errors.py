"""What the command line shows without a traceback.

SuiteError              exit 2   the user's input: what is wrong, where, and what to do
├── StageFailed         exit 1   a stage's process failed; its log says why
├── GateFailed          exit 3   the work was done, and a measurement does not meet its gate
└── Interrupted         exit 130 Ctrl-C or SIGTERM
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SuiteError(Exception):
    """A message for a person: `where` it went wrong (file:line or a key), what, and a `hint` with the cure."""

    exit_code = 2

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.hint = message, where, hint

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"


class StageFailed(SuiteError):
    """A stage's process ended without its artifact."""

    exit_code = 1


class GateFailed(SuiteError):
    """A measured value does not meet a `gate`."""

    exit_code = 3


class Interrupted(SuiteError):
    """The person (or the system) asked the command to stop."""

    exit_code = 130


SHOWN = 20
"""Known words that a hint lists at most."""


def near(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `word`: the closest known one, or those that are known.

    >>> near("rnak", ["rank", "alpha"])
    "did you mean 'rank'?"
    """
    options = list(known)
    close = difflib.get_close_matches(word, options, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    more = f" and {len(options) - SHOWN} more" if len(options) > SHOWN else ""
    return "known: " + ", ".join(options[:SHOWN]) + more
