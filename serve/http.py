"""How requests are read, by httptools, and answers written: with a bound on what is no body, which it would gather
without end, and on how long a client may leave its answer unread."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD = 32 * 2**10
"""Bytes of a request's line and headers, or of the trailers after its body."""
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Protocol(HttpToolsProtocol):
    """uvicorn's, which ends a connection that sends more than `HEAD` bytes, and one read, of anything but bodies.

    One whose client reads nothing for `patience` seconds while more of its answer waits is ended too, and what was
    computed for it with it: to the routes it is a client that has left.
    """

    patience: ClassVar[float] = 60.0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._head = 0  # bytes since the last that belonged to a body, or ended a head
        self._unread: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """The next bytes of the client."""
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head ended among these bytes."""
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of them were body."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What comes next is another request."""
        self._head = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """More is written than the client reads."""
        super().pause_writing()
        # not closed, which would wait until all of it is read
        self._unread = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read most of it."""
        super().resume_writing()
        self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left, or was made to."""
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._unread:
            self._unread.cancel()
            self._unread = None
