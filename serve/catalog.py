"""The models that one server answers for: the base and its adapters, each with its tokenizer and chat template."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from serve.protocol import ApiError
from serve.text import TOOL_CALL, special_ids
from suite.chat import Chat, load_tokenizer
from suite.errors import SuiteError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""OpenAI's, where generation_config.json does not ask for sampling of its own."""


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
    def hidden_beside_tools(self) -> frozenset[int]:
        """Tokens without text where the marks of a tool call have one."""
        return special_ids(self.tokenizer, keep=TOOL_CALL)


class Catalog:
    """What `/v1/models` lists."""

    def __init__(self, model: Path, adapters: Mapping[str, Path], name: str) -> None:
        self.created = int(time.time())
        self.base = name
        base = _served(name, "", model, model)
        self.models = {name: base}
        for adapter, folder in adapters.items():
            same = _tokenizer_bytes(folder) in (_tokenizer_bytes(model), (b"", b"", b""))
            # an adapter tuned with a template of its own is asked with that one
            own = base if same else _served(adapter, adapter, folder, model)
            self.models[adapter] = Served(
                adapter,
                adapter,
                own.tokenizer,
                own.chat or base.chat,
                base.no_chat,
                own.stops | base.stops,
                base.sampling,
            )

    def find(self, name: str) -> Served:
        """The model of that name; raises ApiError 404 that lists what there is."""
        if name not in self.models:
            there = ", ".join(f"'{known}'" for known in self.models)
            raise ApiError(
                404, f"The model '{name}' does not exist; there are {there}.", param="model", code="model_not_found"
            )
        return self.models[name]

    def listing(self) -> dict[str, Any]:
        """The body of `/v1/models`."""
        return {"object": "list", "data": [self.card(name) for name in self.models]}

    def card(self, name: str) -> dict[str, Any]:
        """One entry of it; `parent` is the base of an adapter."""
        parent = {} if name == self.base else {"parent": self.base}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "suite", **parent}


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


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return settings


def _tokenizer_bytes(folder: Path) -> tuple[bytes, ...]:
    return tuple(file.read_bytes() if (file := folder / name).is_file() else b"" for name in TOKENIZER_FILES)
