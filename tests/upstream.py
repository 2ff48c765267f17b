"""A program that looks like an engine's server, for tests of what runs one: `python upstream.py PORT SETTINGS`.

SETTINGS is JSON: `delay` seconds until it answers, `refuse` a text to die with then, `child` a file for the pid of a
process that it leaves in its group, `journal` a file that gets a line for each event, `pause` seconds before an answer,
`pace` seconds between two chunks of a stream. What a request's first message says is what happens: "die", "drop", "hang",
"fail", "lose", "stall", and of "die once" only the first time; any other text is answered.

"lose" is vLLM's end where its process that computes is killed: from then on all that was asked fails, streams within
their status 200, /health says 503, and it takes `wind_down` seconds until the server ends too; without them it does not.
"stall" is a server that hangs: it answers nothing any more, and does not heed SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PORT, SETTINGS = int(sys.argv[1]), json.loads(sys.argv[2])
LOST, STALLED = asyncio.Event(), asyncio.Event()
DEAD = {"error": {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500}}


def note(line: str) -> None:
    if file := SETTINGS.get("journal"):
        with Path(file).open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while head := await reader.readuntil(b"\r\n\r\n"):
        lines = head.decode().split("\r\n")
        method, path, _ = lines[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("authorization") != f"Bearer {os.environ['UPSTREAM_KEY']}":
            answer(writer, 401, {"error": "Unauthorized"})
        elif method == "GET":
            await asyncio.sleep(600 if STALLED.is_set() else 0)
            answer(writer, 503 if LOST.is_set() and path == "/health" else 200, {"data": []})
        elif path.endswith("_lora_adapter"):
            note(f"{path} {body.decode()}")
            answer(writer, 200, {})
        else:
            await complete(reader, writer, body)
        await writer.drain()


async def complete(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
    fields = json.loads(body)
    text = fields["messages"][0]["content"]
    note(f"asked {text}")
    word = now(text)
    if word == "die":
        print("killed by what was asked", file=sys.stderr, flush=True)
        os._exit(9)
    if word == "drop":
        raise ConnectionError
    if word == "lose":
        LOST.set()
        if seconds := SETTINGS.get("wind_down"):
            asyncio.get_running_loop().call_later(seconds, os._exit, 9)
    if word == "stall":
        STALLED.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if word == "hang" or STALLED.is_set():
        # the other side closes: that is how an engine learns that nobody waits
        note("left" if not await reader.read(1) else "?")
        return
    if word == "fail":
        answer(writer, 500, {"object": "error", "message": "out of luck", "type": "X", "code": 500})
        return
    await asyncio.sleep(SETTINGS.get("pause", 0.0))
    if fields.get("stream"):
        await stream(writer, fields)
        return
    if LOST.is_set():
        answer(writer, 500, DEAD)
        return
    choice = {"index": 0, "message": {"role": "assistant", "content": body.decode()}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    answer(writer, 200, {"id": str(PORT), "model": fields["model"], "choices": [choice], "usage": usage})


def now(text: str) -> str:
    """What shall happen: what the text says, but "... once" only the first time."""
    word = text.removesuffix(" once")
    if word == text:
        return text
    marker = Path(f"{SETTINGS.get('journal')}.{word}")
    first = not marker.exists()
    marker.touch()
    return word if first else ""


async def stream(writer: asyncio.StreamWriter, fields: dict[str, Any]) -> None:
    """Events cut into chunks of seven bytes, whose borders fall anywhere; "break" ends in the middle of them."""
    events = [{"model": fields["model"], "choices": [{"delta": {"content": f"{i} 水"}}]} for i in range(5)]
    if LOST.is_set():
        events = [DEAD]
    whole = b"".join(b"data: " + dumps(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for i in range(0, len(whole), 7):
        piece = whole[i : i + 7]
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        await writer.drain()
        await asyncio.sleep(SETTINGS.get("pace", 0.0))
        if i > 70 and fields["messages"][0]["content"] == "break":
            os._exit(9)
    writer.write(b"0\r\n\r\n")


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def answer(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    raw = dumps(body)
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await serve(reader, writer)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    if refuse := SETTINGS.get("refuse"):
        await asyncio.sleep(SETTINGS.get("delay", 0.0))
        os.kill(os.getpid(), {"KILL": signal.SIGKILL, "ILL": signal.SIGILL}.get(refuse, 0))
        sys.exit(refuse)
    if file := SETTINGS.get("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(file).write_text(str(child.pid))
    await asyncio.sleep(SETTINGS.get("delay", 0.0))
    server = await asyncio.start_server(connected, "127.0.0.1", PORT)
    note("started")
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
