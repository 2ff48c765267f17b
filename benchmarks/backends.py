"""What the relay costs, and what engines do behind it, beside our own.

    python benchmarks/backends.py [--quick] [--json] [--vllm]

The relay's cost is measured against an engine that answers at once, or after a known time: every request is asked
directly and through the relay, in turns. With --vllm, the real one follows (`suite env install vllm`), and ours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402
import psutil  # noqa: E402

from serve.backends import endpoint  # noqa: E402

NANO = ROOT / "examples/nano/model"
UPSTREAM = ROOT / "tests/upstream.py"
TOGETHER = 64


@dataclass(frozen=True)
class Side:
    """Where one way of asking leads, the key that it takes, and the relay's process."""

    url: str
    key: str = "none"
    relay: psutil.Process | None = None

    @property
    def used(self) -> float:
        """Seconds of processor time that the relay has used."""
        times = self.relay.cpu_times() if self.relay else None
        return times.user + times.system if times else 0.0


def serve_relay(kind: str, pause: float) -> None:
    """In a process of its own: the gateway before an engine; says where both are, and serves until its input ends."""
    from serve.engines import remote
    from serve.engines.process import Launch
    from serve.engines.vllm import Vllm
    from serve.server import listen, run
    from serve.settings import Settings
    from suite.envs import Environment

    launched: list[tuple[int, str]] = []

    class Noted(Vllm):
        """vLLM, or a program in its place that answers after `pause` seconds."""

        def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:
            launched.append((port, key))
            if kind == "vllm":
                return super().launch(settings, environment, port, key, replica)
            return Launch(
                [sys.executable, str(UPSTREAM), str(port), json.dumps({"pause": pause})], {"UPSTREAM_KEY": key}
            )

    remote.KINDS["vllm"] = Noted()
    options: dict[str, Any] = {"max_length": 1024} if kind == "vllm" else {"env_python": sys.executable}
    settings = Settings(model=NANO, name="nano", backend="vllm", probe=False, log="off", **options)

    def ready() -> None:
        (port, key) = launched[-1]
        print(json.dumps([url, f"http://127.0.0.1:{port}", key]), flush=True)
        threading.Thread(target=end, daemon=True).start()

    def end() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    with listen("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        run(settings, sock, ready)


@contextlib.contextmanager
def relayed(kind: str, pause: float = 0.0) -> Iterator[tuple[Side, Side]]:
    """The relay, and the engine behind it."""
    command = [sys.executable, __file__, "--relay", kind, str(pause)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the relay did not start")
        url, direct, key = json.loads(line)
        yield Side(url, relay=psutil.Process(process.pid)), Side(direct, key)
        process.stdin.close()
        process.stdout.read()


async def chats(side: Side, count: int, together: int, tokens: int) -> tuple[float, list[float], int]:
    """Seconds for `count` chats, `together` at a time; seconds of each; tokens generated in all, `tokens` at the mean.

    They are of different lengths: vLLM on the CPU was seen to be ten times as fast where all begin in the same step, as
    no requests of several people do.
    """
    body = {
        "model": "nano",
        "messages": [{"role": "user", "content": "Who are you, and what is 12 plus 30?"}],
        "temperature": 0,
        "ignore_eos": True,
    }
    waiting = asyncio.Semaphore(together)
    made, each = 0, []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal made
        length = max(1, tokens // 2 + 7 * number % (tokens + 1))
        async with waiting:
            began = time.perf_counter()
            asked = {**body, "max_tokens": length}
            async with session.post(f"{side.url}/v1/chat/completions", json=asked) as answer:
                answer.raise_for_status()
                made += (await answer.json())["usage"]["completion_tokens"]
            each.append(time.perf_counter() - began)

    headers = {"Authorization": f"Bearer {side.key}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        await one(session, 0)
        each.clear()
        made = 0
        began = time.perf_counter()
        await asyncio.gather(*(one(session, number) for number in range(count)))
        return time.perf_counter() - began, each, made


def overhead(rounds: int, count: int) -> dict[str, float]:
    """Milliseconds that the relay adds to a request, one at a time, at the median; and of processor time, its mean."""
    times: tuple[list[float], list[float]] = ([], [])
    with relayed("instant") as sides:
        asyncio.run(chats(sides[0], count, 1, 1))
        used = sides[0].used
        for _ in range(rounds):
            for side, kept in zip(sides, times, strict=True):
                kept += asyncio.run(chats(side, count, 1, 1))[1]
        used = sides[0].used - used
    through, direct = (1000 * statistics.median(kept) for kept in times)
    cpu = 1000 * used / (rounds * (count + 1))
    return {"direct_ms": direct, "relayed_ms": through, "added_ms": through - direct, "processor_ms": cpu}


def throughput(kind: str, rounds: int, count: int, tokens: int, pause: float = 0.0) -> dict[str, float]:
    """Rates of many at once, directly and relayed, medians of rounds in turns: requests, or tokens of a real engine."""
    rates: tuple[list[float], list[float]] = ([], [])
    with relayed(kind, pause) as sides:
        for _ in range(rounds):
            for side, kept in zip(sides, rates, strict=True):
                seconds, each, made = asyncio.run(chats(side, count, TOGETHER, tokens))
                kept.append((len(each) if kind == "instant" else made) / seconds)
    through, direct = (statistics.median(kept) for kept in rates)
    return {"direct_per_s": direct, "relayed_per_s": through, "lost_percent": 100 * (1 - through / direct)}


def ours(rounds: int, count: int, tokens: int) -> dict[str, float]:
    """Tokens per second of our own engine on the same chats."""
    rates = []
    with tempfile.TemporaryDirectory() as folder, endpoint(NANO, name="nano", log=Path(folder) / "log") as running:
        for _ in range(rounds):
            seconds, _, made = asyncio.run(chats(Side(running.url), count, TOGETHER, tokens))
            rates.append(made / seconds)
    return {"direct_per_s": statistics.median(rates)}


def main() -> int:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--vllm", action="store_true", help="the real vLLM too")
    parser.add_argument("--relay", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.relay:
        serve_relay(given.relay[0], float(given.relay[1]))
        return 0
    rounds = 2 if given.quick else 5
    found = {
        "relay, one at a time": overhead(rounds, 100),
        "relay, 64 at once, an engine of 200 ms": throughput("instant", rounds, 640, 1, pause=0.2),
    }
    if given.vllm:
        found["vLLM, 64 chats at once"] = throughput("vllm", rounds, 2 * TOGETHER, 64)
        found["torch, 64 chats at once"] = ours(rounds, 2 * TOGETHER, 64)
    for name, row in found.items():
        table = f"{name:44}" + "".join(f"{what} {value:9.2f}   " for what, value in row.items())
        print(json.dumps({"name": name, **row}) if given.json else table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
