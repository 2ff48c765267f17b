"""`python -m serve.torch.reference`: what our own engine answers to the probe's questions, in a process of its own.

Reads `{"model": folder, "adapters": {name: folder}, "questions": [...], "tokens": n, "top": n}` from standard input.
Writes for each name ("" is the base) a list with `question`, `prompt` and `answer` to standard output: the prompt's
token ids, and for each token of the greedy answer its log probability with those of the likeliest ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from serve.generation import Generation, Request
from serve.torch.engine import Engine
from suite.chat import Chat, load_tokenizer
from suite.errors import SuiteError


def main() -> int:
    """Answer; what cannot be answered is said in one line, with exit status 2."""
    given = json.load(sys.stdin)
    # the answer is all that may stand on standard output
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        found = references(
            Path(given["model"]),
            {name: Path(folder) for name, folder in given["adapters"].items()},
            given["questions"],
            given["tokens"],
            given["top"],
        )
    except SuiteError as error:
        print(error, file=sys.stderr)
        return 2
    with os.fdopen(output, "w", encoding="utf-8") as stream:
        json.dump(found, stream)
    return 0


def references(
    model: Path, adapters: dict[str, Path], questions: list[str], tokens: int, top: int
) -> dict[str, list[dict[str, Any]]]:
    """The answers of base and adapters, all in one batch."""
    engine = Engine(model, adapters)
    running: list[tuple[str, dict[str, Any], Generation]] = []
    for name, folder in {"": model, **adapters}.items():
        for question, ids, stops in _prompts(model, folder, questions):
            request = Request(ids, name, tokens, stop_ids=stops, logprobs=top)
            running.append((name, {"question": question, "prompt": ids}, engine.submit(request)))
    found: dict[str, list[dict[str, Any]]] = {}
    for name, asked, generation in running:
        generation.wait()
        if generation.finish == "error":
            raise SuiteError(f"our own engine cannot answer: {generation.error}")
        answer = [[score.token, score.logprob, dict(score.top)] for score in generation.scores]
        found.setdefault(name, []).append({**asked, "answer": answer})
    engine.close()
    return found


def _prompts(model: Path, folder: Path, questions: list[str]) -> list[tuple[str, list[int], frozenset[int]]]:
    """Each question with its token ids, and what ends an answer; as plain text where the model cannot chat."""
    own = folder if (folder / "tokenizer_config.json").is_file() else model
    tokenizer = load_tokenizer(own)
    if not tokenizer.chat_template:
        tokenizer = load_tokenizer(model)
    stops = frozenset({tokenizer.eos_token_id} - {None})
    if not tokenizer.chat_template:
        return [(question, list(tokenizer(question)["input_ids"]), stops) for question in questions]
    chat = Chat(tokenizer)
    return [(q, chat.ids([{"role": "user", "content": q}], generate=True), stops) for q in questions]


if __name__ == "__main__":
    raise SystemExit(main())
