"""Wall time of asking an endpoint that takes 20 ms a reply, against the ideal and an openai client loop.

The ideal is n x 20 ms / concurrency. "ask" is the client alone, "evaluate" a whole evaluation: reading the set, asking,
extracting, scoring, intervals, report. The best of a few turns; the server is a process of its own.

Where EvalScope is installed (suite env install evalscope), it is given the same 500 questions, and turns are taken:
whole commands from start to end, and without start and imports, our evaluation beside its run_task.

    python benchmarks/eval.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from evalsets.ask import Client, Journal, Request
from evalsets.evaluation import evaluate
from evalsets.sets import load
from suite import envs
from suite.processes import foreign

ROOT = Path(__file__).parents[1]
LATENCY = 0.02
GOAL = 1.25
ROUNDS = 50
"""Replies that each of the concurrent askers waits for: the ideal is ROUNDS x LATENCY = 1 s at any concurrency."""

EVALSCOPE_QUESTIONS = 500
EVALSCOPE_GOAL = 1 / 3
RUN_TASK = """
import json, sys, time
from evalscope import TaskConfig, run_task
task = TaskConfig(**json.load(open(sys.argv[1])))
began = time.perf_counter()
run_task(task)
print(time.perf_counter() - began)
"""

REPLY = {
    "id": "r", "object": "chat.completion", "created": 0, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "B"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 41},
}  # fmt: skip


class Server(asyncio.Protocol):
    """Just enough HTTP to cost next to nothing: one fixed body, LATENCY seconds after each request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self.received) < end + 4 + length:
                return
            self.received = self.received[end + 4 + length :]
            asked = head.startswith(b"post")
            body = json.dumps(REPLY if asked else {"data": [{"id": "m"}]}).encode()
            answer = (
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            asyncio.get_running_loop().call_later(LATENCY if asked else 0, self.transport.write, answer)


def serve(ready: Connection) -> None:
    """Listen on a free port, send its number, and serve until killed."""

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=512)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def ask(url: str, n: int, concurrency: int, folder: Path) -> None:
    """Our client."""
    body = {"model": "m", "max_tokens": 16, "temperature": 0.0}
    requests = [Request(str(i), "chat/completions", body | {"messages": prompt(i)}) for i in range(n)]
    replies = Client(url, concurrency=concurrency).ask(requests, Journal(folder / f"{time.monotonic_ns()}.jsonl"))
    assert sum(reply.text == "B" for reply in replies.values()) == n


def prompt(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Which is number {i}?\nA. one\nB. two\nC. three\nD. four\nAnswer:"}]


def whole(url: str, n: int, concurrency: int, folder: Path) -> None:
    """A whole evaluation of a choice set."""
    work = folder / str(time.monotonic_ns())
    asked = load(str(made(work / "set", n)))
    found = evaluate(Client(url, concurrency=concurrency), "m", [asked], work / "out", work / "journal")
    assert found.metrics["set"]["acc"] == 1


def made(folder: Path, n: int) -> Path:
    """A choice set of n questions."""
    (folder / "val").mkdir(parents=True)
    about = 'kind = "choice"\ntitle = "t"\nlanguages = ["en"]\nlicense = "CC0-1.0"\nsource = "made up"\n'
    (folder / "set.toml").write_text(about, "utf-8")
    rows = [f"{i},Which is number {i}?,one,two,three,four,B" for i in range(n)]
    (folder / "val" / "made_val.csv").write_text("\n".join(["id,question,A,B,C,D,answer", *rows]), "utf-8")
    return folder


def openai_loop(url: str, n: int, concurrency: int, folder: Path) -> None:
    """What a person writes by hand: the openai client and a semaphore; it keeps nothing and scores nothing."""
    from openai import AsyncOpenAI

    del folder

    async def run() -> None:
        gate = asyncio.Semaphore(concurrency)
        async with AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:

            async def one(i: int) -> bool:
                async with gate:
                    messages: Any = prompt(i)
                    reply = await client.chat.completions.create(model="m", messages=messages, max_tokens=16)
                    return reply.choices[0].message.content == "B"

            assert all(await asyncio.gather(*(one(i) for i in range(n))))

    asyncio.run(run())


def best(work: Callable[..., None], times: int, *arguments: Any) -> float:
    """Seconds of the fastest of some turns."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work(*arguments)
        found.append(time.perf_counter() - began)
    return min(found)


def row(measure: str, ours: float, theirs: float, goal: float) -> dict[str, Any]:
    """`goal` is the largest ratio that meets it."""
    ratio = round(ours / theirs, 3)
    return {
        "measure": measure, "ours": round(ours, 3), "theirs": round(theirs, 3), "unit": "s",
        "ratio": ratio, "goal": round(goal, 3), "met": ratio <= goal,
    }  # fmt: skip


def rows(url: str, times: int, folder: Path) -> list[dict[str, Any]]:
    """All measures."""
    found = []
    for concurrency in (16, 64):
        n, ideal = ROUNDS * concurrency, ROUNDS * LATENCY
        ours = best(ask, times, url, n, concurrency, folder)
        evaluated = best(whole, times, url, n, concurrency, folder)
        few = n // 10
        alone, by_hand = (best(work, times, url, few, concurrency, folder) for work in (ask, openai_loop))
        found += [
            row(f"ask {n} at {concurrency}, ideal", ours, ideal, GOAL),
            row(f"evaluate {n} at {concurrency}, ideal", evaluated, ideal, GOAL),
            row(f"ask {few} at {concurrency}, openai client loop", alone, by_hand, 1.0),
        ]
    return found


def command(url: str, work: Path) -> float:
    """Seconds of our whole command."""
    asked = made(work / "set", EVALSCOPE_QUESTIONS)
    told = ["eval", "--url", url, "--model", "m", "--sets", str(asked), "--out", str(work / "out"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "suite.cli", *told], env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def evalscope(url: str, work: Path, python: Path) -> tuple[float, float]:
    """Seconds of the same by EvalScope: the process, and run_task in it."""
    work.mkdir()
    row = {"question": "", "A": "one", "B": "two", "C": "three", "D": "four", "answer": "B"}
    rows = (json.dumps(row | {"question": f"Which is number {i}?"}) for i in range(EVALSCOPE_QUESTIONS))
    (work / "all_val.jsonl").write_text("\n".join(rows), "utf-8")
    task = {
        "model": "m", "api_url": url + "/v1", "api_key": "none", "eval_type": "openai_api", "datasets": ["general_mcq"],
        "dataset_args": {"general_mcq": {"local_path": str(work), "subset_list": ["all"]}}, "eval_batch_size": 16,
        "generation_config": {"max_tokens": 16}, "work_dir": str(work / "out"), "no_timestamp": True,
    }  # fmt: skip
    (work / "job.json").write_text(json.dumps(task), "utf-8")
    began = time.perf_counter()
    told = [str(python), "-I", "-c", RUN_TASK, str(work / "job.json")]
    ran = subprocess.run(told, env=foreign(), check=True, capture_output=True, text=True)
    return time.perf_counter() - began, float(ran.stdout.split()[-1])


def beside_evalscope(url: str, times: int, folder: Path) -> list[dict[str, Any]]:
    """Both measures, in turns; none where it is not installed."""
    environment = envs.get("evalscope")
    if not environment.installed:
        print(f"not measured: {environment.name}, see suite env install", file=sys.stderr)
        return []
    ours, inside, theirs = [], [], []
    for turn in range(times):
        ours.append(command(url, folder / f"ours-{turn}"))
        inside.append(best(whole, 1, url, EVALSCOPE_QUESTIONS, 16, folder))
        theirs.append(evalscope(url, folder / f"theirs-{turn}", environment.python))
    process, run_task = (min(seconds) for seconds in zip(*theirs, strict=True))
    name = f"{EVALSCOPE_QUESTIONS} at 16, EvalScope"
    return [
        row(f"command, {name}", min(ours), process, EVALSCOPE_GOAL),
        row(f"evaluate, {name}'s run_task", min(inside), run_task, EVALSCOPE_GOAL),
    ]


def main() -> None:
    """Measure and print one row a measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(sending,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{receiving.recv()}"
        measured = rows(url, 3 if arguments.quick else 7, Path(folder))
        measured += beside_evalscope(url, 2 if arguments.quick else 4, Path(folder))
    server.kill()
    for line in measured:
        text = "{measure:44} ours {ours:6} theirs {theirs:6} {unit}  ratio {ratio:6} goal {goal} met {met}"
        print(json.dumps(line) if arguments.json else text.format(**line))


if __name__ == "__main__":
    main()
