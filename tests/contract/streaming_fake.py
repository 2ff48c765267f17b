"""An endpoint whose streamed answers a test decides piece by piece, in a thread on the loopback."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Delta = dict[str, Any]
Rule = Callable[[dict[str, Any]], Iterator[Delta] | int]
"""From a request to the deltas of its answer, or to an HTTP status."""


@dataclass
class Streaming:
    """The running endpoint, what was asked of it, and how many answers were broken off by the client."""

    rule: Rule
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    broken_off: int = 0


class _Handler(BaseHTTPRequestHandler):
    fake: Streaming

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == "Bearer wrong":
            return self.reply(401, {"error": {"message": "no"}})
        return self.reply(200, {"data": [{"id": "a"}, {"id": "b"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.fake.asked.append(body)
        deltas = self.fake.rule(body)
        if isinstance(deltas, int):
            return self.reply(deltas, {"error": {"message": "refused by the test"}})
        self.send_response(200)
        self.end_headers()
        try:
            for delta in deltas:
                event = {"choices": [{"index": 0, "delta": delta}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.fake.broken_off += 1
        return None

    def reply(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def endless(word: str) -> Iterator[Delta]:
    """An answer that does not end by itself."""
    while True:
        yield {"content": word}
        time.sleep(0.02)


@contextlib.contextmanager
def streaming(rule: Rule) -> Iterator[Streaming]:
    """Serve `rule` until the block ends."""
    fake = Streaming(rule)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
