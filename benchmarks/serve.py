"""Our server beside those that a person would use instead, over HTTP, in one run in which all take turns.

    python benchmarks/serve.py [--quick] [--json] [--models nano,8m] [--rounds 5]
        [--peers swift=PYTHON,llamafactory=PYTHON,vllm=PYTHON,transformers=PYTHON]

Each peer is named with the interpreter of the environment in which it is installed; one that is absent or fails is a
line that says so. `transformers.generate`, one chat after the other, is always there. Models are copies that never end
a turn, so that every answer has 64 tokens with any server, counted by its own usage. Rates are new tokens per second.
Figures are medians over the rounds, with the lowest and highest, and a ratio is the median of the rounds' own ratios;
a first round only warms up. Servers that are not asked are stopped for that time. All of it takes about 15 minutes with
four peers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import asking, peers, shapes
from benchmarks.peers import PeerError, Server, Setting, running

CHATS = 64
EIGHT = [f"a{number}" for number in range(8)]
MANY = 500
ONE_BY_ONE = ("llamafactory", "swift adapters")
"""They answer one request after the other: 16 chats tell their rate as well as 64, sooner."""

GOALS = {"swift": 2.0, "llamafactory": 10.0, "transformers": 2.0, "vllm": 1.2, "generate": 8.0}
"""How many times the rate of each ours should be, for the base alone."""
MIXED_GOALS = {"vllm": 2.5, "swift adapters": 20.0}


@dataclass
class Figures:
    """What was measured of one thing in each round."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> list[float]:
        """The lowest and the highest."""
        return [_rounded(min(self.values)), _rounded(max(self.values))]


Measured = dict[tuple[str, str], Figures]
"""By server and what was measured."""


@dataclass
class Run:
    """All servers of one model, and what was measured of them."""

    setting: Setting
    pythons: Mapping[str, Path]
    rounds: int
    found: Measured = field(default_factory=dict)
    servers: dict[str, Server] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Why a server is not measured."""

    def note(self, server: str, what: str, value: float) -> None:
        """Keep a value."""
        self.found.setdefault((server, what), Figures()).values.append(value)

    def commands(self) -> dict[str, peers.Command]:
        """How to start each server: ours with 8 adapters and with 500, and those of the peers."""
        many = peers.suite(Path(), Setting(self.setting.model, self.setting.kind, {}, self.setting.scratch))
        many.words.extend(["--lora-dir", str(self.setting.scratch / "many")])
        many.words.extend(["--adapter-memory", f"{shapes.MANY_MEMORY >> 20}MiB"])
        found = {"suite": peers.suite(Path(), self.setting), "suite 500": many}
        alone = Setting(self.setting.model, self.setting.kind, {}, self.setting.scratch)
        for name, python in self.pythons.items():
            mixes = name in peers.MIXES
            found[name] = peers.PEERS[name](python, self.setting if mixes else alone)
            if name == "swift":
                found["swift adapters"] = peers.swift(python, self.setting)
        return found

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """All servers, each started while the others stand still; twice, as the first time may read from the disk."""
        with contextlib.ExitStack() as stack:
            for name, command in self.commands().items():
                try:
                    if self.pythons:
                        with running(name, command, self.setting.scratch):
                            pass
                    server = stack.enter_context(running(name, command, self.setting.scratch))
                except PeerError as error:
                    self.absent[name] = str(error)
                    continue
                self.note(name, "ready", server.ready)
                server.freeze()
                stack.callback(server.thaw)
                self.servers[name] = server
            yield

    def measure(self, server: str, what: str, work: Callable[[Server], float | dict[str, float]], keep: bool) -> None:
        """Let one server work; where it fails it is not asked again."""
        if server not in self.servers or server in self.absent:
            return
        running_one = self.servers[server]
        running_one.thaw()
        try:
            value = work(running_one)
        except asking.FAILURES as error:
            self.absent[server] = f"{what}: {type(error).__name__}: {error}"[:300]
            return
        finally:
            running_one.freeze()
        for name, number in (value if isinstance(value, dict) else {what: value}).items():
            if keep:
                self.note(server, name, number)

    def all(self) -> None:
        """Every measure of every server, round after round."""
        zipf = asking.Zipf(MANY)
        generate = asking.Generate(self.setting.model)
        for number in range(self.rounds + 1):
            rate = generate.rate(4)
            if number:
                self.note("generate", "base", rate)
                self.note("generate", "token", 1000 / rate)
            for name in self.servers:
                count = 16 if name in ONE_BY_ONE else CHATS
                base = self.servers[name].base
                tell = number > 0
                if name == "suite 500":
                    self.measure(name, "zipf", lambda s: asking.chats(s, zipf.draw(CHATS, number)), tell)  # noqa: B023
                    continue
                if name != "swift adapters":
                    self.measure(name, "base", lambda s: asking.chats(s, [base] * count), tell)  # noqa: B023
                    self.measure(name, "one", asking.one, tell)
                if name in ("suite", "swift adapters", *peers.MIXES):
                    for size in (2, 8):
                        names = [base, *EIGHT[:size]]
                        self.measure(name, f"mixed {size}", lambda s: asking.chats(s, asking.turns(names, count)), tell)  # noqa: B023
        for name, server in self.servers.items():
            server.thaw()
            self.note(name, "memory", server.memory())
            server.freeze()


def rows(run: Run) -> Iterator[dict[str, Any]]:
    """What the figures mean."""
    others = [name for name in (*run.servers, "generate") if not name.startswith("suite")]
    ours = run.found

    def against(what: str, theirs: str, their_what: str, goal: float, unit: str, text: str) -> Iterator[dict[str, Any]]:
        own, other = ours.get(("suite", what)), ours.get((theirs, their_what))
        if own and other:
            yield row(text, own, other, unit, goal)

    for name in others:
        few = " (16 chats)" if name in ONE_BY_ONE else " (one by one)" if name == "generate" else ""
        yield from against("base", name, "base", GOALS.get(name, 1), "tokens/s", f"64 chats, base, to {name}{few}")
    for size in (2, 8):
        text = f"64 chats, base and {size} adapters mixed, to"
        yield from against(f"mixed {size}", "suite", "base", 0.85, "tokens/s", f"{text} base alone")
        for name, goal in MIXED_GOALS.items():
            yield from against(f"mixed {size}", name, f"mixed {size}", goal, "tokens/s", f"{text} {name}")
    if ("suite 500", "zipf") in ours and ("suite", "mixed 8") in ours:
        text = "64 chats, 500 adapters on disk, Zipf, to 8 adapters"
        yield row(text, ours["suite 500", "zipf"], ours["suite", "mixed 8"], "tokens/s", 0.7)
        files = (run.setting.scratch / "many").rglob("*.safetensors")
        limit = ours["suite", "memory"].median + sum(file.stat().st_size for file in files) / 2**20
        text = f"memory with 500 adapters, {shapes.MANY_MEMORY >> 20} MiB of them held, to 8 and all 500 held"
        yield row(text, ours["suite 500", "memory"], Figures([limit]), "MiB", 1, least=True)
    for name in others:
        yield from _lower(run, name)
    if starts := {name: ours[name, "ready"] for name in others if (name, "ready") in ours}:
        fastest = min(starts, key=lambda name: starts[name].median)
        text = f"start to first answer, to the fastest ({fastest})"
        yield row(text, ours["suite", "ready"], starts[fastest], "s", 0.5, least=True)
    for name, why in run.absent.items():
        yield {"measure": name, "note": f"not measured: {why}"}


def _lower(run: Run, name: str) -> Iterator[dict[str, Any]]:
    texts = {
        "first": ("1 chat, time to first token", "ms"), "token": ("1 chat, time per token", "ms"),
        "memory": ("memory of all processes", "MiB"),
    }  # fmt: skip
    for what, (text, unit) in texts.items():
        if (name, what) in run.found and ("suite", what) in run.found:
            yield row(f"{text}, to {name}", run.found["suite", what], run.found[name, what], unit, 1, least=True)


def row(text: str, ours: Figures, theirs: Figures, unit: str, goal: float, *, least: bool = False) -> dict[str, Any]:
    """One line; `ratio` is ours / theirs, and `goal` the smallest that is good enough, or the largest with `least`."""
    if len(ours.values) == len(theirs.values):
        # of the same rounds: what slows the machine for a minute slows both
        ratio = statistics.median(a / b for a, b in zip(ours.values, theirs.values, strict=True))
    else:
        ratio = ours.median / theirs.median
    return {
        "measure": text, "ours": _rounded(ours.median), "theirs": _rounded(theirs.median), "unit": unit,
        "ratio": _rounded(ratio), "goal": goal, "met": ratio <= goal if least else ratio >= goal,
        "ours_spread": ours.spread, "theirs_spread": theirs.spread,
    }  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.3g}") if abs(value) < 1000 else round(value)


def overhead(folder: Path, times: int) -> dict[str, Any]:
    """The gateway alone, its engine answering at once, against the limit."""
    found = Figures([1000 * seconds for seconds in asking.gateway_alone(folder, times)])
    return row("gateway, one request of 64 tokens, to its limit", found, Figures([2.0]), "ms", 1, least=True)


def main() -> None:
    """Print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="nano and 3 rounds: a minute without peers")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--models", default="nano,8m", help="nano, 8m [nano,8m]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the one that warms up [5]")
    parser.add_argument("--peers", default="", help="NAME=PYTHON,... of " + ", ".join(peers.PEERS))
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which takes the servers down
    pythons = {name: Path(python) for name, _, python in (p.partition("=") for p in given.peers.split(",") if p)}
    if strange := pythons.keys() - peers.PEERS:
        parser.error(f"unknown peers: {', '.join(strange)}")
    for model in ["nano"] if given.quick else given.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            setting = shapes.make(model, Path(scratch), EIGHT, MANY)
            run = Run(setting, pythons, 3 if given.quick else given.rounds)
            with run.started():
                run.all()
            found = [*rows(run), overhead(setting.model, 200)]
        for line in found:
            line = {**line, "measure": f"{model}: {line['measure']}"}
            print(json.dumps(line) if given.json else _text(line), flush=True)


def _text(line: dict[str, Any]) -> str:
    if "note" in line:
        return "{measure:80} {note}".format(**line)
    return (
        "{measure:80} {ours:8} {theirs:8} {unit:9} x{ratio} (goal {goal}, {0})  {ours_spread} {theirs_spread}".format(
            "met" if line["met"] else "missed", **line
        )
    )


if __name__ == "__main__":
    main()
