"""Makes a model with a present `ollama` command, and asks it one question to see that it reads the prompt as we do."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.ollama.dialogues import collate
from suite.chat import Chat
from suite.errors import SuiteError

QUESTION = "Who are you?"
ASKED = [{"role": "user", "content": QUESTION}]
WAIT = 600
"""Seconds for one command or answer; the weights are copied and loaded meanwhile."""


def installed() -> bool:
    """Whether there is an `ollama` command."""
    return shutil.which("ollama") is not None


def typed(folder: Path, name: str) -> str:
    """What a person types, in a shell of the machine that has Ollama, to do what `create` does."""
    steps = (["cd", str(folder)], ["ollama", "create", name, "-f", "Modelfile"], ["ollama", "run", name, QUESTION])
    return " && ".join(map(shlex.join, steps))


def create(folder: Path, name: str, say: Callable[[str], None], expected_tokens: int | None = None) -> dict[str, Any]:
    """Make the model `name` from the Modelfile in `folder`, and ask it a question.

    `expected_tokens` is `prompt_tokens` of the model that the package was made from, for `ASKED`. Returns the answer
    and how many tokens Ollama read. Raises SuiteError when a model of that name exists, when the server does not
    answer, or when it read another number.
    """
    _ollama(folder, ["list"], "the Ollama server does not answer", hint="start it with: ollama serve")
    if subprocess.run(["ollama", "show", name], capture_output=True, timeout=WAIT, check=False).returncode == 0:
        raise SuiteError(
            f"Ollama has a model named {name}, which would be overwritten",
            hint=f"choose another name, or remove it with: ollama rm {name}",
        )
    say(f"ollama create {name}")
    _ollama(folder, ["create", name, "-f", "Modelfile"], f"ollama create {name} failed")
    asked = {"model": name, "messages": ASKED, "think": False, "stream": False, "options": {"num_predict": 64}}
    reply = _post(asked)
    read = reply.get("prompt_eval_count")
    if None not in (read, expected_tokens) and read != expected_tokens:
        raise SuiteError(
            f"Ollama reads {read} tokens for {QUESTION!r}, where the model's own template gives {expected_tokens}",
            where=name,
            hint="`ollama show --template` says which template it uses, the package's README which it should",
        )
    answer = reply.get("message", {}).get("content", "")
    say(f"{name} answers {QUESTION!r}: {answer!r}")
    return {"name": name, "question": QUESTION, "answer": answer, "prompt_tokens": read}


def prompt_tokens(chat: Chat, before: Sequence[dict[str, str]] = ()) -> int:
    """How many tokens an engine reads for `ASKED` without thinking: the template's, and a BOS that the tokenizer adds.

    `before` are the messages that the package puts before every conversation, its system text first.
    """
    ids = chat.ids(collate([*before, *ASKED])[1], generate=True, enable_thinking=False)
    added = list(chat.tokenizer("")["input_ids"][:1])
    return len(ids) + (added == [chat.tokenizer.bos_token_id] and ids[:1] != added)


def _ollama(folder: Path, arguments: list[str], failure: str, hint: str = "") -> None:
    """Run `ollama`; raises SuiteError with the last line that it said."""
    done = subprocess.run(["ollama", *arguments], cwd=folder, capture_output=True, text=True, timeout=WAIT, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SuiteError(f"{failure}: {said[-1] if said else done.returncode}", where=str(folder), hint=hint)


def _post(request: dict[str, Any]) -> dict[str, Any]:
    """One request to the chat API of the server that the `ollama` command talks to."""
    host = os.environ.get("OLLAMA_HOST", "").removeprefix("http://") or "127.0.0.1:11434"
    url = f"http://{host if ':' in host else host + ':11434'}/api/chat"
    body = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(body, timeout=WAIT) as response:
            reply: dict[str, Any] = json.load(response)
    except (OSError, urllib.error.URLError, json.JSONDecodeError) as error:
        said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
        raise SuiteError(f"Ollama did not answer the question: {said}", where=url) from error
    return reply
