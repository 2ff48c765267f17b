"""A model and its adapters: the names that requests may use, and what each of them stands for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import unreadable
from serve.offers import offers
from serve.settings import Settings
from suite.errors import SuiteError

Register = Callable[[str, Path], Awaitable[None]]
"""Has an engine take the adapter in a folder under a name; raises SuiteError for one that does not fit."""
Forget = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Found:
    """What a name stands for: the adapter `adapter` of the model `base`, or with "" that model itself."""

    name: str
    base: str
    adapter: str


class Family:
    """A model called `base`, and its adapters; used in the event loop only.

    The adapters of `settings` are known to the engine; those in its `lora_dir` are `register`ed with it when they are
    first asked for.
    """

    def __init__(self, settings: Settings, register: Register, forget: Forget) -> None:
        offered = offers(settings.lora_dir, settings.adapters)
        self.base, self.model, self.lora_dir = settings.name, settings.model, settings.lora_dir
        self.folders = {**settings.adapters, **offered}
        """Of all adapters, by name."""
        self._register, self._forget = register, forget
        self._unregistered = set(offered)
        self._found: dict[str, Found] = {}
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._stamps: dict[str, str] = {self.base: _stamp(self.model)}
        self._engine = settings.computed_by

    def __contains__(self, name: str) -> bool:
        return name == self.base or name in self.folders

    @property
    def names(self) -> list[str]:
        """Of the model, and of its adapters."""
        return [self.base, *self.folders]

    async def find(self, name: str) -> Found:
        """What one of the names stands for; KeyError for another, ApiError 400 for an adapter with wrong files."""
        if name not in self._found:
            async with self._changing[name]:
                if name in self and name not in self._found:
                    self._found[name] = await self._open(name)
        return self._found[name]

    async def load(self, name: str, folder: Path) -> None:
        """Add an adapter, or give the one of that name other weights; raises SuiteError for one that does not fit."""
        async with self._changing[name]:
            await self._register(name, folder)
            self._unregistered.discard(name)
            self.folders[name] = folder
            self._found.pop(name, None)
            self._stamps.pop(name, None)

    async def unload(self, name: str) -> None:
        """Offer an adapter no more, and have the engine forget it."""
        async with self._changing[name]:
            if self.folders.pop(name, None) is None:
                return
            self._found.pop(name, None)
            self._stamps.pop(name, None)
            if name in self._unregistered:
                self._unregistered.remove(name)
            else:
                await self._forget(name)

    def stamps(self, name: str) -> list[Any]:
        """Other ones when the files behind a name, or what computes with them, are others; else the same anywhere."""
        if name not in self._stamps:
            self._stamps[name] = _stamp(self.folders[name])
        return [self._engine, self._stamps[self.base], self._stamps[name]]

    async def _open(self, name: str) -> Found:
        try:
            if name in self._unregistered:
                await self._register(name, self.folders[name])
                self._unregistered.discard(name)
            return await asyncio.to_thread(self._read, name)
        except (SuiteError, OSError) as error:
            reason = error.message if isinstance(error, SuiteError) else error.strerror or type(error).__name__
            raise unreadable(name, reason) from None

    def _read(self, name: str) -> Found:
        return Found(name, self.base, "" if name == self.base else name)


def _stamp(folder: Path) -> str:
    """What tells the files of a folder from later ones, at no cost of reading them."""
    stats: list[tuple[str, os.stat_result]] = []
    with contextlib.suppress(OSError):  # it may be deleted while it is served
        files = folder.iterdir() if folder.is_dir() else [folder]
        stats = sorted((file.name, file.stat()) for file in files)
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
