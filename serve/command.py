"""What `suite serve` does: check everything that can be checked at once, then serve until told to stop."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from serve.backends import check_backend
from serve.keys import ENVIRONMENT, Key, read_keys
from serve.offers import NAME, offers
from serve.server import listen, run
from serve.settings import Settings
from suite.errors import SHOWN, SuiteError


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


def parse_models(given: Sequence[str]) -> list[tuple[str, str]]:
    """`small=path`, as a name and a path; the name is "" where there is none.

    >>> parse_models(["small=runs/merged", "nano"])
    [('small', 'runs/merged'), ('', 'nano')]
    """
    found = []
    for text in given:
        name, equals, path = text.partition("=")
        named = bool(equals) and NAME.fullmatch(name) is not None and not Path(text).exists()
        found.append((name, path) if named else ("", text))
    return found


def serve(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM; running requests are allowed to end. Raises SuiteError when it cannot start."""
    for each in settings.models:
        check_backend(each.backend)
    keys = api_keys(settings)
    settings.check()
    with listen(settings.host, settings.port) as sock:
        scheme = "https" if settings.tls_cert else "http"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"{scheme}://{host}:{sock.getsockname()[1]}"
        started = time.monotonic()
        print(f"loading {', '.join(each.url or str(each.model) for each in settings.models)} ...", flush=True)
        status = run(settings, sock, lambda: _announce(url, settings, bool(keys), time.monotonic() - started), keys)
    if status:
        raise SuiteError("the server could not start; the reason is above")


def api_keys(settings: Settings) -> list[Key]:
    """Those that may ask; raises SuiteError where a file of them cannot be read, or other machines would need none."""
    keys = read_keys(Path(settings.api_key_file) if settings.api_key_file else None)
    if not (keys or settings.local or settings.no_key):
        raise SuiteError(
            f"anybody who reaches {settings.host} could use this server",
            where="--host",
            hint=f"name API keys with --api-key-file or {ENVIRONMENT}, or say --no-key",
        )
    return keys


def _announce(url: str, settings: Settings, keys: bool, seconds: float) -> None:
    bases = [each.name for each in settings.models]
    adapters = [name for each in settings.models for name in (*each.adapters, *offers(each.lora_dir))]
    others = [*adapters, *settings.alias]
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    body = {
        "model": next(iter(others), settings.name),
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 100,
        "temperature": 0,
    }
    key = " -H 'Authorization: Bearer KEY'" if keys else ""
    print(
        f"ready in {seconds:.1f} s at {url}/v1\n"
        f"models: {', '.join([*bases, *others[:SHOWN]])}{more}\n"
        f"try:    curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f"          -d '{json.dumps(body)}'\n"
        "stop:   Ctrl-C",
        flush=True,
    )
