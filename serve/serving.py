"""What all routes share: the engine, the models by name, and the bridge between them."""

from __future__ import annotations

from dataclasses import dataclass

from serve.answers import Bridge, Engine
from serve.catalog import Catalog
from serve.protocol import ApiError


@dataclass
class Serving:
    """A server, starting or running. Engine and catalog are None until loading is done; else `problem` says why."""

    engine: Engine | None = None
    catalog: Catalog | None = None
    bridge: Bridge | None = None
    problem: str = ""

    def ready(self) -> tuple[Engine, Catalog, Bridge]:
        """Raises ApiError 503 while requests cannot be answered."""
        if self.engine is None or self.catalog is None or self.bridge is None or not self.engine.alive:
            raise ApiError(503, self.problem or "the model is still loading", kind="server_error")
        return self.engine, self.catalog, self.bridge
