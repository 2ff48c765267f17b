"""What a decode step takes, and how much of it is Python.

    python benchmarks/step.py [--quick] [--json]

Ours is a step of the engine: rows of unequal length in, a token for each out. Theirs is what cannot be saved: the calls
of torch and of compiled code that a step made, one after the other, without the Python that decides on them. Python is
20 % of the step where the ratio is 1.25. Then a step whose rows have adapters in turn, against the same rows of the
base alone. Milliseconds, medians over steps that take turns, so that both meet the same load.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn import functional

from benchmarks.shapes import make
from serve.folders import AdapterFolder, ModelFolder, read_model
from serve.generation import Generation, Request
from serve.torch.adapters import Adapters
from serve.torch.cache import SlotCache
from serve.torch.forward import Forward
from serve.torch.loading import load_model
from serve.torch.native.function import Function
from serve.torch.scheduler import Step

MODELS = ("nano", "8M")
BATCHES = (1, 16, 64)
PROMPT = 40
GOAL = 1.25
MIXES = (2, 8)
"""How many adapters share a batch with the base."""
MIXED_GOAL = 1 / 0.85
WARM = 10
"""Steps that are not counted."""


def engine_step(forward: Forward, batch: int, adapters: Sequence[AdapterFolder] = ()) -> Callable[[], object]:
    """A decode step of `batch` rows whose prompts have up to twice `PROMPT` tokens; each call makes the rows longer.

    Rows have the base and `adapters` in turn.
    """
    rows = [Generation(Request([3 + row % 90] * (PROMPT + row * PROMPT // batch))) for row in range(batch)]
    for row, generation in enumerate(rows):
        generation.weights = ("", *adapters)[row % (1 + len(adapters))]
    forward.run(Step(0, rows, [row.left for row in rows]), rows)
    for row in rows:
        row.cached = len(row.tokens)
        row.tokens.append(3)
    step = Step(0, rows, [1] * batch)

    def run() -> None:
        tokens = forward.run(step, rows).argmax(-1).flatten().tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.cached += 1
            row.tokens.append(token)

    return run


def with_adapters(base: ModelFolder, folders: Sequence[Path]) -> tuple[Forward, list[AdapterFolder]]:
    """A model of its own, with these adapters in memory."""
    arrived = threading.Event()
    model = load_model(base, "float32").requires_grad_(False)
    adapters = Adapters(model, base, 1 << 30, arrived.set)
    checked = [adapters.check(folder) for folder in folders]
    for adapter in checked:
        waiting = Generation(Request([3]))
        waiting.weights = adapter
        adapters.park(waiting)
        while not adapters.admit(list)[0]:
            arrived.wait()
            arrived.clear()
    return Forward(model, adapters, SlotCache(0, 1)), checked


class Noting:
    """Notes the calls of torch's larger operators, and of compiled code, with their very arguments.

    Compiled code has to be made while it is open.
    """

    def __init__(self) -> None:
        self.made: list[Callable[[], object]] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Noting:
        for owner, name in ((torch, "mm"), (torch, "index_select"), (functional, "linear"), (torch.Tensor, "argmax")):
            self._open.enter_context(patch.object(owner, name, self._noted(getattr(owner, name))))
        at = Function.at
        self._open.enter_context(patch.object(Function, "at", lambda *given: self._noted(at(*given))))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _noted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            if self.made is not None:
                self.made.append(partial(call, *args, **kwargs))
            return call(*args, **kwargs)

        return note


def replay(base: ModelFolder, batch: int, steps: int) -> Callable[[], object]:
    """What a step of rows computes that have made so many before, again and again."""
    with Noting() as noting:
        forward, _ = with_adapters(base, [])
        run = engine_step(forward, batch)
        for _ in range(steps):
            run()
        noting.made = made = []
        run()

    def again(_: object = forward) -> None:  # whose memory the calls work on
        for call in made:
            call()

    return again


def taking_turns(steps: int, *measured: Callable[[], object]) -> list[float]:
    """Median milliseconds of each; some first calls only warm up."""
    seconds: list[list[float]] = [[] for _ in measured]
    for number in range(steps + WARM):
        for found, run in zip(seconds, measured, strict=True):
            started = time.perf_counter()
            run()
            if number >= WARM:
                found.append(time.perf_counter() - started)
    return [1000 * statistics.median(found) for found in seconds]


def row(measure: str, ours: float, theirs: float, goal: float) -> dict[str, Any]:
    """A line of results."""
    ratio = ours / theirs
    return {
        "measure": measure, "ours": round(ours, 2), "theirs": round(theirs, 2), "unit": "ms", "ratio": round(ratio, 2),
        "goal": round(goal, 2), "met": ratio <= goal,
    }  # fmt: skip


@torch.inference_mode()
def rows(folder: Path, loras: Sequence[Path], name: str, steps: int) -> list[dict[str, Any]]:
    """One row for each batch size, and for each number of adapters in the largest."""
    base = read_model(folder)
    model = load_model(base, "float32").requires_grad_(False)
    forward = Forward(model, Adapters(model, base, 0, lambda: None), SlotCache(0, 1))
    found = []
    for batch in BATCHES:
        bare = replay(base, batch, steps // 2 + WARM)
        ours, theirs = taking_turns(steps, engine_step(forward, batch), bare)
        found.append(row(f"{name}, a decode step of {batch}, theirs is without Python", ours, theirs, GOAL))
    for count in MIXES:
        mixed, checked = with_adapters(base, loras[:count])
        ours, theirs = taking_turns(steps, engine_step(mixed, batch, checked), engine_step(forward, batch))
        measure = f"{name}, a decode step of {batch}, base and {count} adapters, theirs is the base alone"
        found.append(row(measure, ours, theirs, MIXED_GOAL))
    return found


def main() -> None:
    """Print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 steps instead of 200")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # TorchScript is deprecated, and sees numbers where they do not vary
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            (folder := Path(scratch) / name).mkdir()
            made = make(name, folder, [f"a{number}" for number in range(max(MIXES))], 0)
            for found in rows(made.model, [*made.adapters.values()], name, 50 if given.quick else 200):
                if given.json:
                    print(json.dumps(found))
                else:
                    share = f"{1 - found['theirs'] / found['ours']:.0%} of ours"
                    print("{measure:50} {ours:7} {theirs:7} {unit}  x{ratio} (goal {goal}), {0}".format(share, **found))


if __name__ == "__main__":
    main()
