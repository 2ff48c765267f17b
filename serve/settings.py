"""What to serve, and how: checked before torch is imported."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from serve.answers import Engine
from serve.folders import check_fits, check_layers, read_adapter, read_model
from serve.offers import offers
from suite import envs
from suite.errors import SuiteError
from suite.serving import Options, check_aliases, foreign

DISTRIBUTIONS = {"torch": ("torch", "transformers"), "llamacpp": ("llama-cpp-python",)}
"""What computes where the engine runs in our own environment."""


class Settings(Options):
    """A model with its adapters by name, and the options of serving them."""

    model: Path = Path()
    adapters: dict[str, Path] = Field(default_factory=dict)
    name: str = "base"
    """The base model's."""
    url: str = ""
    """An OpenAI endpoint that runs already, in place of `model`."""
    api_key_env: str = ""
    """The variable with the key that it asks for."""
    trusting: bool = False
    """Whether adapters are loaded from anywhere, because only a gateway asks, which has seen to it."""
    beside: tuple[Settings, ...] = ()
    """More models behind the same server. Who may ask, limits, log and aliases are those of the first one."""

    @property
    def models(self) -> tuple[Settings, ...]:
        """All of them, this one being the first."""
        return (self, *self.beside)

    @property
    def in_process(self) -> bool:
        """Whether the server computes by itself: with our engine, where that serves one model once."""
        return self.backend == "torch" and self.replicas == 1 and not (self.beside or self.url)

    @property
    def computed_by(self) -> list[str]:
        """The engine, its version and its precision: answers of the same files may differ with each of them."""
        if self.backend in DISTRIBUTIONS:
            version = " ".join(map(importlib.metadata.version, DISTRIBUTIONS[self.backend]))
        else:
            version = self.env_python or envs.get(self.backend).digest
        return [self.backend, version, self.dtype, envs.device()]

    def check(self) -> None:
        """Raise SuiteError for what can be known to fail from names and file headers; torch-free."""
        owners: dict[str, str] = {}
        for each in self.models:
            for name in each._checked_names():
                if name in owners:
                    said = f"'{owners[name]}' and '{each.name}' both serve a model '{name}'"
                    raise SuiteError(said, hint="give one of them another name")
                owners[name] = each.name
        # what an endpoint serves is known once it is asked
        there = tuple(f"{each.name}/" for each in self.models if each.url)
        targets = {target for weights in self.alias.values() for target in weights}
        check_aliases(self.alias, {*owners, *(target for target in targets if target.startswith(there))})
        for each in self.models:
            each.check_engine()
        self.check_tls()

    def _checked_names(self) -> list[str]:
        if self.url:
            return [self.name]
        offered = offers(self.lora_dir, self.adapters)
        if self.name in self.adapters or self.name in offered:
            raise SuiteError(f"the base and an adapter are both named '{self.name}'", hint="name the base with --name")
        if self.backend == "llamacpp":  # its files are no folders of ours, and it has no adapters
            return [self.name]
        base = read_model(self.model)
        if self.backend == "torch":
            check_layers(base.layer_types, self.model)
        for path in self.adapters.values():
            check_fits(read_adapter(path, dora=self.backend == "torch"), base, inner=self.backend == "torch")
        return [self.name, *self.adapters, *offered]

    def check_engine(self) -> None:
        """Raise SuiteError for what the engine has no option for, or is not there to do."""
        if self.url or self.backend != "torch":
            from serve.engines.remote import check

            check(self)
            return
        if name := foreign(self):
            raise SuiteError("this is for engines of other programs, not for torch", where=name)

    def check_tls(self) -> None:
        """Raise SuiteError for a certificate that cannot be used."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise SuiteError("a certificate and its key belong together", hint="give both --tls-cert and --tls-key")
        if self.tls_cert:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key)
            except OSError as error:  # ssl.SSLError is one
                raise SuiteError(f"cannot be used: {error}", where=f"--tls-cert {self.tls_cert}") from None

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def start_engine(self, notify: Callable[[list[Any]], None]) -> Engine:
        """Load the model; imports torch."""
        from serve.torch.engine import Engine as TorchEngine

        return TorchEngine(
            self.model,
            self.adapters,
            dtype=self.dtype,
            max_batch=self.max_batch,
            max_length=self.max_length,
            cache_memory=self.cache_memory,
            prefix_cache=self.prefix_cache,
            adapter_memory=self.adapter_memory,
            notify=notify,
        )
