"""Ask a model its held-out questions greedily: `python examples/nano/measure.py MODEL QUESTIONS [--show N]`.

QUESTIONS is make_data.py's `held_out.jsonl`. An answer counts when it is exactly the expected one. Prints a table in
Markdown, and with `--show` the first N wrong answers of each skill.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from suite.chat import Chat

BATCH = 50


def answers(model: Any, chat: Chat, rows: list[dict[str, Any]]) -> list[str]:
    """The model's greedy replies to all but the last message of each row."""
    tokenizer = chat.tokenizer
    replies = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        prompts = [chat.text(row["messages"][:-1], row.get("tools"), generate=True) for row in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=64, do_sample=False)  # (B, T + up to 64)
        replies += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def expected(chat: Chat, row: dict[str, Any]) -> str:
    """The last message as the template writes it."""
    prompt = chat.text(row["messages"][:-1], row.get("tools"), generate=True)
    whole = chat.text(row["messages"], row.get("tools"))
    return whole[len(prompt) :].split(chat.tokenizer.eos_token)[0]


def skill_of(row: dict[str, Any]) -> str:
    """The skill that a question is counted under: products apart, for their operands cannot be reasoned out."""
    products = " × " in row["messages"][-1]["content"]
    return f"{row['skill']}, products" if products else str(row["skill"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each skill")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    chat = Chat.load(args.model)
    skills: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in args.questions.read_text("utf-8").splitlines():
        row = json.loads(line)
        skills[skill_of(row)].append(row)
    print("| skill | questions | right |\n|---|---|---|")
    for skill, rows in skills.items():
        replies = answers(model, chat, rows)
        wrong = [(row, said) for row, said in zip(rows, replies, strict=True) if said != expected(chat, row)]
        print(f"| {skill} | {len(rows)} | {1 - len(wrong) / len(rows):.0%} |", flush=True)
        for row, said in wrong[: args.show]:
            print(f"    {row['messages'][-2]['content']!r} -> {said!r}, not {expected(chat, row)!r}")


if __name__ == "__main__":
    main()
