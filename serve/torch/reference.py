"""`python -m serve.torch.reference`: what our own engine answers to the probe's questions, in a process of its own.

Reads `{"model": folder, "adapters": {name: folder}, "questions": [...], "tokens": n, "top": n}` from standard input.
Writes for each name ("" is the base) a list with `question`, `chat`, `prompt` and `answer` to standard output: whether
it was asked as a chat, its token ids, and each token of the greedy answer with the log probabilities of the likeliest.
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
        for asked in _prompts(model, folder, questions):
            # nothing ends an answer: all have the same length, whatever an engine takes for an end
            request = Request(asked["prompt"], name, tokens, logprobs=top)
            running.append((name, asked, engine.submit(request)))
    found: dict[str, list[dict[str, Any]]] = {}
    for name, asked, generation in running:
        generation.wait()
        if generation.finish == "error":
            raise SuiteError(f"our own engine cannot answer: {generation.error}")
        answer = [[score.token, score.logprob, dict(score.top)] for score in generation.scores]
        found.setdefault(name, []).append({**asked, "answer": answer})
    engine.close()
    return found


def _prompts(model: Path, folder: Path, questions: list[str]) -> list[dict[str, Any]]:
    """Each `question` with its `prompt`, its token ids; as a `chat`, or as plain text where the model cannot chat."""
    tokenizer = load_tokenizer(folder if (folder / "tokenizer_config.json").is_file() else model)
    if not tokenizer.chat_template:
        tokenizer = load_tokenizer(model)
    chat = Chat(tokenizer) if tokenizer.chat_template else None

    def ids(question: str) -> list[int]:
        if chat is None:
            return list(tokenizer(question)["input_ids"])
        return chat.ids([{"role": "user", "content": question}], generate=True)

    return [{"question": question, "chat": chat is not None, "prompt": ids(question)} for question in questions]


if __name__ == "__main__":
    raise SystemExit(main())
