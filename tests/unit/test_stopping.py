"""Where answers end at stop strings, however they are cut into pieces."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serve.engines.stopping import Ending

LETTERS = "ab "


def ended(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is left of a text that is read letter by letter."""
    for end in range(1, len(text) + 1):
        places = [text[:end].find(stop) for stop in stops if stop]
        if found := [place for place in places if place >= 0]:
            return text[: min(found)], True
    return text, False


@given(
    st.text(LETTERS, max_size=20),
    st.lists(st.text(LETTERS, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_an_answer_ends_at_the_first_complete_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    ending = Ending(stops)
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    shown = "".join(ending.push(text[first:last]) for first, last in itertools.pairwise(places)) + ending.finish()
    assert (shown, ending.stopped) == ended(text, stops)


def test_no_more_is_held_back_than_may_become_a_stop_string() -> None:
    ending = Ending(["STOP"])
    assert [ending.push(piece) for piece in ("a S", "T", "x", "ST")] == ["a ", "", "STx", ""]
    assert (ending.finish(), ending.finish()) == ("ST", "")
    assert ending.push("OP") == "OP"  # what was shown is no beginning any more
