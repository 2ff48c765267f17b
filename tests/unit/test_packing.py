from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from suite.train.packing import pack

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@given(LENGTHS, st.integers(1, 16))
def test_every_token_is_in_exactly_one_row(lengths: list[int], size: int) -> None:
    rows = pack(lengths, size)
    tokens = [(number, at) for row in rows for number, start, end in row for at in range(start, end)]
    assert sorted(tokens) == [(number, at) for number, length in enumerate(lengths) for at in range(length)]


@given(LENGTHS, st.integers(1, 16))
def test_no_row_is_too_long_and_only_long_documents_are_cut(lengths: list[int], size: int) -> None:
    for row in pack(lengths, size):
        assert 0 < sum(end - start for _, start, end in row) <= size
        for number, start, end in row:
            assert (start, end) == (0, lengths[number]) or lengths[number] > size


@given(LENGTHS, st.integers(2, 16))
def test_at_most_one_row_is_half_empty(lengths: list[int], size: int) -> None:
    filled = [sum(end - start for _, start, end in row) for row in pack(lengths, size)]
    assert sum(2 * tokens <= size for tokens in filled) <= 1


def test_pieces_of_a_long_document_fill_whole_rows() -> None:
    assert pack([10, 1], 4) == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10), (1, 0, 1)]]
