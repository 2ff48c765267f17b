"""What our own engine needs to answer for a name: tokenizer, chat template, end tokens, settings of sampling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from serve.dialect import Dialect
from serve.families import Family, Forget, Found, Register
from serve.settings import Settings
from serve.text import plain_encode, special_ids
from suite.chat import Chat, load_tokenizer
from suite.errors import SuiteError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""OpenAI's, where generation_config.json does not ask for sampling of its own."""


@dataclass(frozen=True)
class Served(Found):
    """A name with all that our own engine needs to answer for it. `no_chat` says why it cannot chat, if so."""

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


class Tokenized(Family):
    """A family whose names are `Served`: an adapter tuned with a template of its own is asked with that one."""

    def __init__(self, settings: Settings, register: Register, forget: Forget) -> None:
        super().__init__(settings, register, forget)
        base = _served(self.base, self.model, self.model)
        self._found[self.base] = base
        # equal tokenizers exist once
        self._by_tokenizer = {"": base, _tokenizer_digest(self.model): base}

    def _read(self, name: str) -> Served:
        folder = self.folders[name]
        digest = _tokenizer_digest(folder)
        if digest not in self._by_tokenizer:
            own, base = _served(self.base, folder, self.model), self._by_tokenizer[""]
            self._by_tokenizer[digest] = replace(
                own, chat=own.chat or base.chat, no_chat=base.no_chat, stops=own.stops | base.stops
            )
        return replace(self._by_tokenizer[digest], name=name, adapter=name)


def _served(base: str, folder: Path, model: Path) -> Served:
    tokenizer = load_tokenizer(folder)
    settings = _generation_config(model)
    ends = settings.get("eos_token_id")
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    try:
        chat, no_chat = Chat(tokenizer, stops), ""
    except SuiteError as error:
        chat, no_chat = None, error.message
    if chat and chat.turn_end is not None:
        # a model's settings may name the end of a text alone
        stops.add(chat.turn_end)
    return Served(base, base, "", tokenizer, chat, no_chat, frozenset(stops), sampling(model))


def sampling(model: Path) -> dict[str, float]:
    """How tokens are picked where a request does not say it: OpenAI's way, or as generation_config.json asks."""
    settings = _generation_config(model)
    asked = {k: settings[k] for k in DEFAULTS if settings.get("do_sample") and settings.get(k) is not None}
    return {**DEFAULTS, **asked}


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


def _tokenizer_digest(folder: Path) -> str:
    """Of all that makes a folder's tokenizer; "" where there is none."""
    contents = {name: file.read_bytes() for name in TOKENIZER_FILES if (file := folder / name).is_file()}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest() if contents else ""
