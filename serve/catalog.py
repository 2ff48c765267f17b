"""The names that one server answers to: its models with their adapters, and aliases that stand for any of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve.aliases import Aliases
from serve.errors import ApiError
from serve.families import Family, Found
from suite.errors import SHOWN

Visible = Callable[[str], bool]
"""Which names a client may know of."""
EVERY: Visible = lambda _: True  # noqa: E731


class Catalog:
    """What `/v1/models` lists, and who answers to which name; used in the event loop only."""

    def __init__(self, families: Sequence[Family], aliases: Mapping[str, Mapping[str, float]]) -> None:
        self.created = int(time.time())
        self.families = families
        self.aliases = Aliases(aliases)

    def __contains__(self, name: str) -> bool:
        return self.family(name) is not None

    @property
    def base(self) -> str:
        """The first model."""
        return self.families[0].base

    @property
    def models(self) -> list[str]:
        """All names but the aliases."""
        return [name for family in self.families for name in family.names]

    @property
    def names(self) -> list[str]:
        """Of the models, their adapters and the aliases."""
        return [*self.models, *self.aliases]

    def family(self, name: str) -> Family | None:
        """The model of that name, or the one whose adapter has it."""
        return next((family for family in self.families if name in family), None)

    async def find(self, name: str, user: str = "", visible: Visible = EVERY) -> Found:
        """What answers a request for `name`; an alias sends all requests of one `user` to the same target.

        Raises ApiError: 404 for a name that does not exist or is not `visible`, 400 for an adapter with wrong files.
        """
        target = self.aliases.pick(name, user) if name in self.aliases else name
        family = self.family(target)
        if family is None or not visible(name):
            raise self._unknown(name, visible)
        try:
            return await family.find(target)
        except KeyError:  # it was taken away this moment
            raise self._unknown(name, visible) from None

    def listing(self, visible: Visible = EVERY) -> dict[str, Any]:
        """The body of `/v1/models`."""
        return {"object": "list", "data": [self._card(name) for name in self.names if visible(name)]}

    def card(self, name: str, visible: Visible = EVERY) -> dict[str, Any]:
        """One entry of it; raises ApiError 404."""
        if name not in self.names or not visible(name):
            raise self._unknown(name, visible)
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        """`parent` is an adapter's base, `targets` are an alias's shares, `fingerprint` stands for files and engine."""
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "suite"}
        card["fingerprint"] = self._fingerprint(name)
        if name in self.aliases:
            return {**card, "targets": self.aliases.shares(name)}
        family = self.family(name)
        return card if family is None or name == family.base else {**card, "parent": family.base}

    def _fingerprint(self, name: str) -> str:
        """Another one when the files behind a name, or the engine, are others; else the same in any server."""
        family = self.family(name)
        parts: Any = family.stamps(name) if family else []
        if name in self.aliases:
            parts = {target: [share, self._fingerprint(target)] for target, share in self.aliases.shares(name).items()}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _unknown(self, name: str, visible: Visible) -> ApiError:
        there = [f"'{known}'" for known in self.names if visible(known)]
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        text = f"The model '{name}' does not exist; there are {', '.join(there[:SHOWN])}{more}."
        return ApiError(404, text, param="model", code="model_not_found")
