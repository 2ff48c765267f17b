"""One server process: a listening socket, the gateway on it, the torch engine behind it."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.answers import Engine
from serve.folders import check_fits, read_adapter, read_model
from suite.errors import SuiteError

DRAIN_SECONDS = 30
"""After SIGTERM or Ctrl-C, running requests have this long to end."""


@dataclass(frozen=True)
class Settings:
    """What to serve, and how."""

    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    name: str = "base"
    dtype: str = "auto"
    max_batch: int = 64
    max_length: int | None = None
    """Tokens of prompt and answer together; None is what the model was made for."""
    api_keys: Sequence[str] = ()

    def check(self) -> None:
        """Raise SuiteError for what can be known to fail from names and file headers; torch-free."""
        if self.name in self.adapters:
            raise SuiteError(f"the base and an adapter are both named '{self.name}'", hint="name the base with --name")
        base = read_model(self.model)
        for path in self.adapters.values():
            check_fits(read_adapter(path), base)

    def start_engine(self, notify: Callable[[list[Any]], None]) -> Engine:
        """Load the model; imports torch."""
        from serve.torch.engine import Engine as TorchEngine

        return TorchEngine(
            self.model,
            self.adapters,
            dtype=self.dtype,
            max_batch=self.max_batch,
            max_length=self.max_length,
            notify=notify,
        )


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket; raises SuiteError when the address is taken or is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        hint = "another server listens there; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise SuiteError(f"cannot listen on {host}:{port}: {error.strerror}", hint=hint) from None
    return sock


def run(settings: Settings, sock: socket.socket, ready: Callable[[], None] = lambda: None) -> int:
    """Serve until SIGTERM or SIGINT, then let running requests end. Returns 0, or 2 when loading failed."""
    import uvicorn

    from serve.gateway import create_app

    failed: list[SuiteError] = []

    def loaded(error: SuiteError | None) -> None:
        if error is None:
            ready()
            return
        failed.append(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        server.should_exit = True

    app = create_app(
        settings.model,
        settings.adapters,
        settings.name,
        settings.start_engine,
        api_keys=settings.api_keys,
        loaded=loaded,
    )
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for library in ("torchao", "torch"):  # they complain at import about what nobody here uses
        logging.getLogger(library).setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=60,  # clients reuse connections; one that closes while they do is an error to them
    )
    server = uvicorn.Server(config)
    # uvicorn raises the signal again after its shutdown; that was all there is to do
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[sock])
    return 2 if failed else 0
