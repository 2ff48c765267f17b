"""Regular expressions of people and of data, which may not stop an evaluation however they are written."""

from __future__ import annotations

from functools import cache

import regex

from evalsets.extract.reply import THINKING
from suite.errors import SuiteError

LONGEST = 10.0
"""Seconds in which a search of one reply is done, unless its pattern backtracks without end."""


@cache
def compiled(pattern: str) -> regex.Pattern[str]:
    """The pattern; raises ValueError, with what is wrong, for none."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(str(error)) from None


def found(pattern: str, text: str) -> regex.Match[str] | None:
    """The first place that the pattern fits; raises SuiteError where nobody could wait for it."""
    try:
        return compiled(pattern).search(text, timeout=LONGEST)
    except TimeoutError:
        hint = "repeated groups that may be empty or overlap, such as (a+)+, take forever; write them once"
        raise SuiteError(f"the pattern {pattern!r} takes more than {LONGEST:g} s on one reply", hint=hint) from None


def check(pattern: str, where: str) -> None:
    """Raise SuiteError where a set's `extract` is no pattern, or has not one group."""
    try:
        groups = compiled(pattern).groups
    except ValueError as error:
        raise SuiteError(
            f"extract: {error}", where=where, hint="a backslash in \"...\" is written twice; '...' takes it as it is"
        ) from None
    if groups != 1:
        hint = "put round brackets around the answer; others begin with (?:"
        raise SuiteError(f"extract has {groups} groups, and needs one", where=where, hint=hint)


def narrowed(pattern: str, reply: str) -> str:
    """The part of a reply where its answer is: all of it, or what a set's `extract` finds, if anything."""
    if not pattern:
        return reply
    match = found(pattern, THINKING.sub(" ", reply))
    return (match[1] or "") if match else ""
