"""How a server ends: new requests are refused, those that run end, and nothing stays.

loading ──> ready ──SIGTERM──> draining (new requests: 503) ──nothing runs, or time is over──> ended
   └─────────────────────────────┴── SIGTERM (again) ──> ended at once
"""

from __future__ import annotations

import os
from types import FrameType

import uvicorn

from serve.serving import Serving


class Server(uvicorn.Server):
    """uvicorn, which closes its socket at the first signal, made to answer until what runs has ended."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self.serving = serving

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal drains; a second one, or one while there is nothing to drain yet, ends the process."""
        if self.serving.state != "ready":
            os._exit(0)
        self.serving.traffic.drain(self.serving.settings.drain)

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether this was all."""
        if self.serving.traffic.drained:
            self.serving.cancel()
            self.should_exit = True
        return await super().on_tick(counter)
