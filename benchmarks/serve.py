"""How fast one server answers many chats, beside `transformers.generate` on the same model in the same run.

    python benchmarks/serve.py [--quick] [--json] [--model FOLDER]

Everything is asked over HTTP, as a client would. Rates are new tokens per second, medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx

from serve.backends import Endpoint, endpoint

NANO = Path(__file__).parents[1] / "examples/nano/model"
NEW = 64


def question(number: int) -> list[dict[str, str]]:
    """A short conversation; no two are the same."""
    return [{"role": "user", "content": f"What is {number} plus {number * 7 % 100}? Then say who you are."}]


def chats(server: Endpoint, count: int, models: list[str]) -> float:
    """Tokens per second of `count` chats sent at once, `models` taking turns."""

    async def ask() -> float:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            bodies = [
                {
                    "model": models[i % len(models)],
                    "messages": question(i),
                    "max_tokens": NEW,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                for i in range(count)
            ]
            started = time.perf_counter()
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
            seconds = time.perf_counter() - started
        tokens = sum(answer.raise_for_status().json()["usage"]["completion_tokens"] for answer in answers)
        return float(tokens / seconds)

    return asyncio.run(ask())


def one_after_the_other(model: Any, tokenizer: Any, count: int) -> float:
    """Tokens per second of `count` chats through `generate`, each alone."""
    started = time.perf_counter()
    for number in range(count):
        prompt = tokenizer.apply_chat_template(
            question(number), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        model.generate(**prompt, max_new_tokens=NEW, min_new_tokens=NEW, max_length=None, do_sample=False)
    return count * NEW / (time.perf_counter() - started)


def make_adapter(model: Any, folder: Path, seed: int) -> Path:
    """A LoRA of rank 8 on every linear layer, with random weights: its speed does not depend on them."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


def interleaved(rounds: int, measures: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each measure over rounds that take them in turn; a first round only warms up."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if number:
                values[name].append(value)
    return {name: statistics.median(found) for name, found in values.items()}


def row(measure: str, ours: float, theirs: float, goal: float) -> dict[str, Any]:
    """One line of the result; `ratio` is ours / theirs."""
    ratio = ours / theirs
    return {
        "measure": measure,
        "ours": round(ours, 1),
        "theirs": round(theirs, 1),
        "unit": "tokens/s",
        "ratio": round(ratio, 2),
        "goal": goal,
        "met": ratio >= goal,
    }


def run(folder: Path, rounds: int, sequential: int) -> list[dict[str, Any]]:
    """All rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = {name: make_adapter(model, Path(scratch) / name, seed) for seed, name in enumerate("ab")}
        with endpoint(folder, adapters) as server:
            rates = interleaved(
                rounds,
                {
                    "generate": lambda: one_after_the_other(model, tokenizer, sequential),
                    "1": lambda: chats(server, 1, ["base"]),
                    "16": lambda: chats(server, 16, ["base"]),
                    "64": lambda: chats(server, 64, ["base"]),
                    "64 mixed": lambda: chats(server, 64, ["base", "a", "b"]),
                },
            )
    return [
        row("1 chat over HTTP, to generate", rates["1"], rates["generate"], 0.9),
        row("16 chats at once, to generate one by one", rates["16"], rates["generate"], 4.0),
        row("64 chats at once, to generate one by one", rates["64"], rates["generate"], 8.0),
        row("64 chats, base and 2 adapters mixed, to base alone", rates["64 mixed"], rates["64"], 0.85),
    ]


def main() -> None:
    """Print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 50 s: 3 rounds instead of 9")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--model", type=Path, default=NANO, help="model folder [nano]")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    for found in run(given.model, 3 if given.quick else 9, 4 if given.quick else 16):
        if given.json:
            print(json.dumps(found))
        else:
            print(
                "{measure:52} {ours:8} {theirs:8} {unit}  x{ratio} (goal {goal}, {0})".format(
                    "met" if found["met"] else "missed", **found
                )
            )


if __name__ == "__main__":
    main()
