"""Where an answer ends, for engines that do not find stop strings in its text."""

from __future__ import annotations

from collections.abc import Sequence

from serve.text import begun


class Ending:
    """The text of one choice up to its first stop string, wherever the pieces in which it comes are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, piece: str) -> str:
        """What may be shown now that `piece` has come; what may become a stop string is held back."""
        if self.stopped:
            return ""
        text, self._held = self._held + piece, ""
        places = ((text.find(stop), len(stop)) for stop in self._stops)
        if found := [(at + length, at) for at, length in places if at >= 0]:
            self.stopped = True
            return text[: min(found)[1]]  # the one that is complete first
        shown = len(text) - begun(text, self._stops)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, when no more comes."""
        held, self._held = self._held, ""
        return held
