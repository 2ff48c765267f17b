"""The answer in a reply, from replies as models write them: an option's letter or words, several letters, a number."""

from evalsets.extract.numbers import number, same
from evalsets.extract.options import letter, named
from evalsets.extract.pattern import narrowed
from evalsets.extract.several import letters

__all__ = ["letter", "letters", "named", "narrowed", "number", "same"]
