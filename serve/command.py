"""What `suite serve` does: check everything that can be checked at once, then serve until told to stop."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.backends import check_backend
from serve.server import Settings, listen, run
from suite.errors import SuiteError

NAME = re.compile(r"[\w.@:/-]+")


def parse_loras(text: str) -> dict[str, Path]:
    """`a=path,b=path` as names and folders; a path without a name is named like its folder.

    >>> parse_loras("law=runs/law,style")
    {'law': PosixPath('runs/law'), 'style': PosixPath('style')}
    """
    found: dict[str, Path] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, given, rest = part.partition("=")
        path = Path(rest if given else first)
        name = first.strip() if given else path.resolve().name
        if not NAME.fullmatch(name) or not str(rest if given else first).strip():
            raise SuiteError(
                f"'{part}' is not name=path", where="--lora", hint="e.g. --lora law=runs/law,style=runs/style"
            )
        if name in found:
            raise SuiteError(f"two adapters are named '{name}'", where="--lora", hint="give each a name: name=path")
        found[name] = path
    return found


def serve(
    model: Path,
    adapters: Mapping[str, Path],
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: str = "torch",
    api_keys: Sequence[str] = (),
    dtype: str = "auto",
    max_batch: int = 64,
    max_length: int | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; running requests are allowed to end. Raises SuiteError when it cannot start."""
    check_backend(backend)
    settings = Settings(model, dict(adapters), name, dtype, max_batch, max_length, tuple(api_keys))
    settings.check()
    with listen(host, port) as sock:
        url = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        started = time.monotonic()
        print(f"loading {model} ...", flush=True)
        status = run(settings, sock, lambda: _announce(url, settings, time.monotonic() - started))
    if status:
        raise SuiteError("the server could not start; the reason is above")


def _announce(url: str, settings: Settings, seconds: float) -> None:
    adapters = "".join(f", {name} (adapter)" for name in settings.adapters)
    body = {
        "model": next(iter(settings.adapters), settings.name),
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 100,
        "temperature": 0,
    }
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
    print(
        f"ready in {seconds:.1f} s at {url}/v1\n"
        f"models: {settings.name}{adapters}\n"
        f"try:    curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f"          -d '{json.dumps(body)}'\n"
        "stop:   Ctrl-C",
        flush=True,
    )
