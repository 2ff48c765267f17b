"""The socket that a server listens on."""

from __future__ import annotations

import asyncio
import socket

from serve.server import listen


def test_answers_are_sent_at_once() -> None:
    """Without TCP_NODELAY the second piece of an answer waits for the client's delayed acknowledgement: 40 ms."""
    found: list[int] = []

    async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect() -> None:
        sock = listen("127.0.0.1", 0)
        async with await asyncio.start_server(accepted, sock=sock):
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            await reader.read()
            writer.close()
            await writer.wait_closed()

    asyncio.run(connect())
    assert found[0]
