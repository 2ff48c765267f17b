"""Work on what arrives, by a thread that takes its time, while more arrives."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

GATHERING = 0.02
"""Seconds in which things may gather: to wake a thread for each takes the interpreter from those who bring them."""


@contextlib.contextmanager
def aside(work: Callable[[list[T]], None]) -> Iterator[Callable[[T], None]]:
    """What hands things to a thread that does `work` with all that gathered, in order; all is done after the block.

    Raises what `work` raised, with the next call or after the block.
    """
    waiting: deque[T] = deque()
    ends = threading.Event()
    raised: list[Exception] = []

    def run() -> None:
        last = False
        try:
            while not last:
                last = ends.wait(GATHERING)
                if gathered := [waiting.popleft() for _ in range(len(waiting))]:
                    work(gathered)
        except Exception as error:
            raised.append(error)

    def hand(thing: T) -> None:
        if raised:
            raise raised[0]
        waiting.append(thing)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield hand
    finally:
        ends.set()
        thread.join()
    if raised:
        raise raised[0]
