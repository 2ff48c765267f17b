"""Kept beginnings as a plain algorithm: never another one's tokens, never a place twice, none lost."""

from __future__ import annotations

from collections.abc import Hashable

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serve.torch.prefix import Prefixes

SIZE = 2
weights = st.sampled_from(["", "a", ("a", 2)])
# few different tokens, so that beginnings are alike; -1 and -2 have the same hash
beginnings = st.lists(st.sampled_from([-1, -2, 0]), max_size=12)


class Keeping(RuleBasedStateMachine):
    """Prefixes beside memory that holds, for each place, all that its keys and values depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = Prefixes(5, SIZE)
        self.memory: dict[int, tuple[Hashable, list[int]]] = {}

    @rule(weights=weights, tokens=beginnings)
    def keep(self, weights: Hashable, tokens: list[int]) -> None:
        known, places = self.prefixes.keep(weights, tokens)
        assert len(set(places)) == len(places)
        for index, place in enumerate(places, known + 1):
            self.memory[place] = weights, tokens[: index * SIZE]
        assert known + len(places) == min(len(tokens) // SIZE, self.prefixes.blocks)
        # what was just kept is found, all of it
        assert len(self.prefixes.find(weights, tokens)) == known + len(places)

    @rule(weights=weights, tokens=beginnings)
    def find(self, weights: Hashable, tokens: list[int]) -> None:
        for index, place in enumerate(self.prefixes.find(weights, tokens), 1):
            assert self.memory[place] == (weights, tokens[: index * SIZE])

    @rule()
    def clear(self) -> None:
        self.prefixes.clear()
        self.memory.clear()

    @invariant()
    def every_place_is_free_or_holds_one_block_that_can_be_found(self) -> None:
        kept = [block.place for block in self.prefixes._kept.values()]
        assert sorted([*kept, *self.prefixes._free]) == list(range(self.prefixes.blocks))
        ways = [self.prefixes._walk(owner, tokens) for owner, tokens in self.memory.values()]
        assert {self.prefixes._kept[key].place for keys in ways for key in keys} == set(kept)


Keeping.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestKeeping = Keeping.TestCase


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(weights, beginnings), max_size=20))
def test_with_room_for_all_it_is_a_plain_table_of_beginnings(given_: list[tuple[Hashable, list[int]]]) -> None:
    prefixes, table = Prefixes(1000, SIZE), set[tuple[Hashable, tuple[int, ...]]]()
    for owner, tokens in given_:
        cuts = [(owner, tuple(tokens[:end])) for end in range(SIZE, len(tokens) + 1, SIZE)]
        assert len(prefixes.find(owner, tokens)) == len(table.intersection(cuts))
        prefixes.keep(owner, tokens)
        table.update(cuts)
    assert len(prefixes) == len(table)


def test_what_was_unused_longest_goes_first() -> None:
    prefixes = Prefixes(3, SIZE)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        prefixes.keep("", tokens)
    prefixes.find("", [1, 1])
    prefixes.keep("", [4, 4])
    assert [len(prefixes.find("", [token, token])) for token in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_without_blocks_nothing_is_kept() -> None:
    prefixes = Prefixes(0, SIZE)
    assert prefixes.keep("", [1, 1]) == (0, [])
    assert prefixes.find("", [1, 1]) == []
