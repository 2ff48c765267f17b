"""API keys: which secret is whose, which models it may ask, and how much a minute."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field

from suite import toml
from suite.config import Config, Where, parse
from suite.errors import SuiteError

ENVIRONMENT = "SUITE_API_KEYS"
GATEWAY = "SUITE_GATEWAY_KEY"
"""The variable with the key of a gateway, for a server that it starts and that answers nobody else."""

log = logging.getLogger("serve")


class Rights(Config):
    """What a key may do: its table in a .toml file of keys, beside `key` itself."""

    models: tuple[str, ...] = ("*",)
    """Models and aliases it may ask; * in a name stands for anything."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Requests it may make in a minute."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Tokens, read and generated, that its answers may have in a minute."""
    concurrent: int | None = Field(None, ge=1)
    """Requests that may run at the same time."""
    admin: bool = False
    """Whether it may load and unload adapters, and change aliases."""


@dataclass(frozen=True)
class Key:
    """A key by its name; of the secret there is only the SHA-256 digest."""

    name: str
    digest: bytes
    rights: Rights

    @staticmethod
    def of(secret: str, name: str = "", rights: Rights | None = None) -> Key:
        """A key without a name is called by the start of its digest."""
        digest = hashlib.sha256(secret.encode()).digest()
        return Key(name or digest.hex()[:8], digest, rights or Rights())

    def may_use(self, model: str) -> bool:
        """Whether it may ask the model of that name."""
        return any(fnmatchcase(model, pattern) for pattern in self.rights.models)

    @property
    def sees_all(self) -> bool:
        """Whether nothing of the server is hidden from it."""
        return "*" in self.rights.models


def read_keys(file: Path | None) -> list[Key]:
    """The keys of the environment and of a file; raises SuiteError for a file that cannot be read or holds none."""
    keys = [Key.of(secret) for secret in os.environ.get(ENVIRONMENT, "").replace(",", " ").split()]
    if file is not None:
        found = _tables(file) if file.suffix == ".toml" else _lines(file)
        if not found:
            raise SuiteError(f"{file} holds no key", where="--api-key-file", hint="write one key a line")
        keys += found
    owners: dict[bytes, str] = {}
    for key in keys:
        if key.digest in owners:
            raise SuiteError(
                f"the keys of [{owners[key.digest]}] and [{key.name}] are the same", where="--api-key-file"
            )
        owners[key.digest] = key.name
    return keys


def _lines(file: Path) -> list[Key]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot be read: {error}", where=f"--api-key-file {file}") from None
    secrets = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [Key.of(secret) for secret in secrets]


def _tables(file: Path) -> list[Key]:
    data, lines = toml.read(file)

    class Place(Where):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, path: tuple[str | int, ...]) -> str:
            return f"{file}:{lines.get((self.name, *path), lines.get((self.name,), 1))}"

    keys = []
    for name, table in data.items():
        where = Place(name)
        secret = table.get("key") if isinstance(table, dict) else None
        if not isinstance(secret, str) or not secret.strip():  # said without what stands there
            raise SuiteError(f"[{name}] needs a key", where=where(()), hint='e.g. key = "sk-..."')
        rights: dict[str, Any] = {setting: value for setting, value in table.items() if setting != "key"}
        keys.append(Key.of(secret.strip(), name, parse(Rights, rights, where)))
    return keys


class Bucket:
    """A token bucket: it holds what a minute allows, is full at first and refills evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def missing(self, amount: float) -> float:
        """Seconds until `amount` is there; 0.0 if it is."""
        now = self.clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (amount - self._level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Take it out, even below nothing: an answer's tokens are known when they are there."""
        self._level -= amount


class Meter:
    """What one key used."""

    def __init__(self, rights: Rights, clock: Callable[[], float] = time.monotonic) -> None:
        self.rights = rights
        self.running = 0
        self._requests = Bucket(rights.requests_per_minute, clock) if rights.requests_per_minute else None
        self._tokens = Bucket(rights.tokens_per_minute, clock) if rights.tokens_per_minute else None

    def refused(self) -> tuple[str, int] | None:
        """Why another request may not start now and after how many seconds it may, or None when it may."""
        rights = self.rights
        if rights.concurrent is not None and self.running >= rights.concurrent:
            return f"{rights.concurrent} requests of this API key run already", 1
        if self._requests and (seconds := self._requests.missing(1)):
            return f"this API key may make {rights.requests_per_minute} requests a minute", math.ceil(seconds)
        if self._tokens and (seconds := self._tokens.missing(1)):
            return f"this API key may use {rights.tokens_per_minute} tokens a minute", math.ceil(seconds)
        return None

    def begin(self) -> None:
        """A request starts."""
        self.running += 1
        if self._requests:
            self._requests.take(1)

    def end(self, tokens: int) -> None:
        """It has ended, and read and generated that many tokens."""
        self.running -= 1
        if self._tokens:
            self._tokens.take(tokens)


class Keys:
    """All keys of a server, each with its meter; those of `file` are read again when it changes."""

    def __init__(
        self, keys: Iterable[Key], file: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file, self._clock = file, clock
        self._version = _version(file)
        self._keys: Sequence[tuple[Key, Meter]] = [(key, Meter(key.rights, clock)) for key in keys]

    def find(self, secret: bytes) -> tuple[Key, Meter] | None:
        """Whose it is. All are compared, and digests of one length, so that no time tells which one came close."""
        self._refresh()
        digest = hashlib.sha256(secret).digest()
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry[0].digest, digest):
                found = entry
        return found

    def _refresh(self) -> None:
        """A file that is wrong changes nothing: a slip of the pen locks nobody out."""
        if self._version == (version := _version(self._file)):
            return
        self._version = version
        try:
            keys = read_keys(self._file)
        except SuiteError as error:
            log.warning("the API keys stay as they were: %s", error)
            return
        meters = dict(self._keys)
        self._keys = [(key, meters.get(key) or Meter(key.rights, self._clock)) for key in keys]
        log.warning("the API keys were read again: there are %d", len(keys))


def _version(file: Path | None) -> tuple[int, int, int] | None:
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None
