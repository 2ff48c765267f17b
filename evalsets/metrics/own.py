"""A person's own metric, `module:function`, named by a set.toml that this person wrote; data never names code.

The function takes the reply and what was expected, two texts, and returns a number from 0 to 1.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from suite.errors import SuiteError


@cache
def load(name: str, where: str = "") -> Callable[[str, str], Any]:
    """The function; raises SuiteError, with the place that names it, where it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        text = f"metric '{name}' cannot be imported: {type(error).__name__}: {error}"
        raise SuiteError(text, where=where, hint="its module must be on PYTHONPATH") from None
    if not callable(found):
        hint = "def metric(reply: str, expected: str) -> float"
        raise SuiteError(f"metric '{name}' is no function", where=where, hint=hint)
    return found  # type: ignore[no-any-return]


def digest(name: str) -> str:
    """Hash of the module that has the function: a metric that was changed gives other scores."""
    load(name)
    file = importlib.import_module(name.partition(":")[0]).__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def score(name: str, reply: str, expected: str) -> float:
    """What the function says of a reply; raises SuiteError where that is no number from 0 to 1."""
    try:
        value = load(name)(reply, expected)
    except SuiteError:
        raise
    except (Exception, SystemExit) as error:
        raise SuiteError(f"metric '{name}' failed: {type(error).__name__}: {error}", hint=_about(reply)) from None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SuiteError(f"metric '{name}' gave {value!r}, which is no number from 0 to 1", hint=_about(reply))
    return float(value)


def _about(reply: str) -> str:
    return f"the reply was {reply[:60]!r}"
