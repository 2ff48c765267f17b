"""The models that one server answers for: the base, its adapters and aliases, each with tokenizer and chat template."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from serve.aliases import Aliases
from serve.dialect import Dialect
from serve.protocol import ApiError
from serve.text import plain_encode, special_ids
from suite.chat import Chat, load_tokenizer
from suite.errors import SHOWN, SuiteError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""OpenAI's, where generation_config.json does not ask for sampling of its own."""

Visible = Callable[[str], bool]
"""Which names a client may know of."""
EVERY: Visible = lambda _: True  # noqa: E731


@dataclass(frozen=True)
class Served:
    """One name that requests may use; `adapter` "" is the base. `no_chat` says why it cannot chat, if so."""

    name: str
    adapter: str
    tokenizer: Any
    chat: Chat | None
    no_chat: str
    stops: frozenset[int]
    sampling: dict[str, float]

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Tokens without text."""
        return special_ids(self.tokenizer)

    @cached_property
    def encode(self) -> Callable[[str, bool], list[int]]:
        """Token ids of a text, with special ones around it or not."""
        return plain_encode(self.tokenizer)

    @cached_property
    def dialect(self) -> Dialect:
        """How the chat template writes reasoning and calls."""
        return _dialect(self.chat)

    @cached_property
    def longest_token(self) -> int:
        """No token stands for more characters."""
        return _longest_token(self.tokenizer)

    @cached_property
    def hidden_in_chat(self) -> frozenset[int]:
        """Tokens without text where the marks of reasoning have one."""
        return special_ids(self.tokenizer, keep=self.dialect.reasoning or ())

    @cached_property
    def hidden_beside_tools(self) -> frozenset[int]:
        """Tokens without text where the marks of reasoning and of calls have one."""
        return special_ids(self.tokenizer, keep=self.dialect.marks)


class Catalog:
    """What `/v1/models` lists, and what changes it; used in the event loop only.

    `adapters` are known to the engine; those in `offers` are `register`ed with it when they are first asked for.
    """

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path],
        name: str,
        offers: Mapping[str, Path],
        aliases: Mapping[str, Mapping[str, float]],
        register: Callable[[str, Path], None],
    ) -> None:
        self.created = int(time.time())
        self.model, self.base = model, name
        self.aliases = Aliases(aliases)
        self.folders = {**adapters, **offers}
        """Of all adapters, by name."""
        self._unregistered = set(offers)
        self._register = register
        base = _served(name, "", model, model)
        self._served = {name: base}
        self._by_tokenizer = {"": base, _tokenizer_digest(model): base}
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._stamps: dict[str, str] = {name: _stamp(model)}

    def __contains__(self, name: str) -> bool:
        return name == self.base or name in self.folders

    @property
    def names(self) -> list[str]:
        """Of the base, the adapters and the aliases."""
        return [self.base, *self.folders, *self.aliases]

    async def find(self, name: str, user: str = "", visible: Visible = EVERY) -> Served:
        """What answers a request for `name`; an alias sends all requests of one `user` to the same target.

        Raises ApiError: 404 for a name that does not exist or is not `visible`, 400 for an adapter with wrong files.
        """
        target = self.aliases.pick(name, user) if name in self.aliases else name
        if target in self.folders and target not in self._served and visible(name):
            async with self._changing[target]:
                if target in self.folders and target not in self._served:
                    await self._open(target)
        if target not in self._served or not visible(name):
            raise self._unknown(name, visible)
        return self._served[target]

    async def load(self, name: str, folder: Path) -> None:
        """Add an adapter, or give the one of that name other weights; raises SuiteError for one that does not fit."""
        async with self._changing[name]:
            await asyncio.to_thread(self._register, name, folder)
            self._unregistered.discard(name)
            self.folders[name] = folder
            self._served.pop(name, None)
            self._stamps.pop(name, None)

    async def unload(self, name: str, forget: Callable[[str], None]) -> None:
        """Offer an adapter no more, and have the engine `forget` it."""
        async with self._changing[name]:
            if self.folders.pop(name, None) is None:
                return
            self._served.pop(name, None)
            self._stamps.pop(name, None)
            if name in self._unregistered:
                self._unregistered.remove(name)
            else:
                await asyncio.to_thread(forget, name)

    def listing(self, visible: Visible = EVERY) -> dict[str, Any]:
        """The body of `/v1/models`."""
        return {"object": "list", "data": [self._card(name) for name in self.names if visible(name)]}

    def card(self, name: str, visible: Visible = EVERY) -> dict[str, Any]:
        """One entry of it; raises ApiError 404."""
        if name not in self.names or not visible(name):
            raise self._unknown(name, visible)
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        """`parent` is the base of an adapter, `targets` are an alias's shares, `fingerprint` stands for the files."""
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "suite"}
        card["fingerprint"] = self._fingerprint(name)
        if name in self.aliases:
            return {**card, "targets": self.aliases.shares(name)}
        return card if name == self.base else {**card, "parent": self.base}

    def _fingerprint(self, name: str) -> str:
        """Another one when the files behind a name are others; the same in another server with the same files."""
        if name in self.aliases:
            parts: Any = {
                target: [share, self._fingerprint(target)] for target, share in self.aliases.shares(name).items()
            }
        else:
            if name not in self._stamps:
                self._stamps[name] = _stamp(self.folders[name])
            parts = [self._stamps[self.base], self._stamps[name]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _unknown(self, name: str, visible: Visible) -> ApiError:
        there = [f"'{known}'" for known in self.names if visible(known)]
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        text = f"The model '{name}' does not exist; there are {', '.join(there[:SHOWN])}{more}."
        return ApiError(404, text, param="model", code="model_not_found")

    async def _open(self, name: str) -> None:
        folder = self.folders[name]
        try:
            if name in self._unregistered:
                await asyncio.to_thread(self._register, name, folder)
                self._unregistered.discard(name)
            served = await asyncio.to_thread(self._read, name, folder)
        except (SuiteError, OSError) as error:
            reason = error.message if isinstance(error, SuiteError) else error.strerror
            raise ApiError(400, f"the adapter '{name}' cannot be served: {reason}", param="model") from None
        self._served[name] = served

    def _read(self, name: str, folder: Path) -> Served:
        """An adapter tuned with a template of its own is asked with that one; equal tokenizers exist once."""
        digest = _tokenizer_digest(folder)
        if digest not in self._by_tokenizer:
            own, base = _served(name, name, folder, self.model), self._by_tokenizer[""]
            self._by_tokenizer[digest] = replace(
                own, chat=own.chat or base.chat, no_chat=base.no_chat, stops=own.stops | base.stops
            )
        return replace(self._by_tokenizer[digest], name=name, adapter=name)


def _served(name: str, adapter: str, folder: Path, model: Path) -> Served:
    tokenizer = load_tokenizer(folder)
    settings = _generation_config(model)
    ends = settings.get("eos_token_id")
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    sampling = {k: settings[k] for k in DEFAULTS if settings.get("do_sample") and settings.get(k) is not None}
    try:
        chat, no_chat = Chat(tokenizer, stops), ""
    except SuiteError as error:
        chat, no_chat = None, error.message
    return Served(name, adapter, tokenizer, chat, no_chat, frozenset(stops), {**DEFAULTS, **sampling})


@lru_cache(maxsize=64)  # hundreds of adapters share one tokenizer, and a vocabulary is long
def _longest_token(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()))


@lru_cache(maxsize=64)
def _dialect(chat: Chat | None) -> Dialect:
    return Dialect.of(chat) if chat else Dialect(None, None, takes_tools=False)


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return settings


def _stamp(folder: Path) -> str:
    """What tells the files of a folder from later ones, at no cost of reading them."""
    stats: list[tuple[str, os.stat_result]] = []
    with contextlib.suppress(OSError):  # it may be deleted while it is served
        stats = sorted((file.name, file.stat()) for file in folder.iterdir())
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _tokenizer_digest(folder: Path) -> str:
    """Of all that makes a folder's tokenizer; "" where there is none."""
    contents = {name: file.read_bytes() for name in TOKENIZER_FILES if (file := folder / name).is_file()}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest() if contents else ""
