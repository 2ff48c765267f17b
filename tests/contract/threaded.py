"""A gateway in a thread of this process, where tests can reach into it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from serve.server import listen


@contextlib.contextmanager
def threaded(app: FastAPI, sock: socket.socket | None = None, **options: Any) -> Iterator[str]:
    """The URL under which `app` is served as long as the block lasts; `options` are uvicorn's."""
    sock = sock or listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()
