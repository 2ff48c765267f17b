"""One server process: a listening socket, the gateway on it, the torch engine behind it."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from serve.keys import Key
from serve.preload import preload
from serve.settings import Settings
from suite.errors import SuiteError

SLOW_SECONDS = 3
"""After the drain, clients have this long to read what was made for them."""


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket; raises SuiteError when the address is taken or is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with its protocol named, or asyncio leaves Nagle's algorithm on, which keeps answers back for 40 ms
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        hint = "another server listens there; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise SuiteError(f"cannot listen on {host}:{port}: {error.strerror}", hint=hint) from None
    return sock


def run(
    settings: Settings, sock: socket.socket, ready: Callable[[], None] = lambda: None, keys: Sequence[Key] = ()
) -> int:
    """Serve until SIGTERM or SIGINT, then let running requests end. Returns 0, or 2 when loading failed."""
    failed: list[SuiteError] = []

    def loaded(error: SuiteError | None) -> None:
        # what is there now stays: looking through it for garbage, again and again, is a tenth of a start
        gc.freeze()
        gc.enable()
        if error is None:
            ready()
            return
        failed.append(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        server.should_exit = True

    gc.disable()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for library in ("torchao", "torch"):  # they complain at import about what nobody here uses
        logging.getLogger(library).setLevel(logging.ERROR)
    with _log(settings.log) as log_to:
        # those of `draining.Server` hold between these: while it is imported, and while the interpreter ends
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
        if settings.in_process:
            preload(settings.model)
        from serve.gateway import create_app  # first, as it needs no other library that has to be mapped

        import uvicorn  # isort: skip

        from serve.draining import Server
        from serve.http import Protocol

        app = create_app(settings, keys=keys, log_to=log_to, loaded=loaded)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nothing here asks where a client is
            loop="uvloop",
            http=Protocol,
            ws="none",
            timeout_graceful_shutdown=SLOW_SECONDS,
            timeout_keep_alive=60,  # clients reuse connections; one that closes while they do is an error to them
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        server = Server(config, app.state.serving)
        server.run(sockets=[sock])
    return 2 if failed else 0


@contextlib.contextmanager
def _log(to: str) -> Iterator[IO[str] | None]:
    if to in ("stderr", "off"):
        yield sys.stderr if to == "stderr" else None
        return
    try:
        file = Path(to).open("a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise SuiteError(f"cannot be written: {error.strerror}", where=f"--log {to}") from None
    with file:
        yield file
