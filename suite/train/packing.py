"""Whole documents into rows of one length: best-fit decreasing (Ding et al., arXiv:2404.10830)."""

from __future__ import annotations

from collections.abc import Sequence

Piece = tuple[int, int, int]
"""A document's number, and where the piece of it begins and ends."""


def pack(lengths: Sequence[int], size: int) -> list[list[Piece]]:
    """Rows of pieces that fill at most `size` tokens each; only documents longer than `size` are cut.

    Each piece goes into the fullest row that still has room for it, the longest first.

    >>> pack([3, 5, 2], 5)
    [[(1, 0, 5)], [(0, 0, 3), (2, 0, 2)]]
    """
    pieces = [
        (number, start, min(start + size, length))
        for number, length in enumerate(lengths)
        for start in range(0, length, size)
    ]
    pieces.sort(key=lambda piece: piece[1] - piece[2])
    rows: list[list[Piece]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    for piece in pieces:
        length = piece[2] - piece[1]
        room = next((room for room in range(length, size + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, size
        else:
            row = with_room[room].pop()
        rows[row].append(piece)
        with_room[room - length].append(row)
    return rows
