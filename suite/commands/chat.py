"""`suite chat`: talk to an endpoint, answers appear as they are made."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from suite.commands.flags import Parser
from suite.errors import SuiteError

HELP = "/model NAME switches, /models lists, /new starts afresh, /quit ends"


def command(verb: str, arguments: list[str]) -> int:
    """Read lines from the terminal (or stdin) until its end."""
    parser = Parser(f"suite {verb}", f"Talk to an OpenAI endpoint. {HELP}.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the endpoint [http://127.0.0.1:8000]")
    parser.add_argument("--model", help="the model or adapter to talk to [the endpoint's first]")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token [0]")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer in tokens [512]")
    given = parser.read(arguments)
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {}
    base = given.url.rstrip("/").removesuffix("/v1") + "/v1"
    with httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10, read=300)) as http:
        try:
            Conversation(
                http, given.model, given.system, {"temperature": given.temperature, "max_tokens": given.max_tokens}
            ).talk()
        except httpx.TransportError as error:
            raise SuiteError(f"no answer from {given.url}: {error}", hint="start one with: suite serve") from None
    return 0


class Conversation:
    """One conversation with one endpoint; the model can change on the way."""

    def __init__(self, http: Any, model: str | None, system: str | None, options: dict[str, Any]) -> None:
        self.http, self.options = http, options
        self.names = [m["id"] for m in self.http.get("/models").raise_for_status().json()["data"]]
        if model and model not in self.names:
            raise SuiteError(f"no model '{model}' at this endpoint", hint=f"it has: {', '.join(self.names)}")
        self.model = model or self.names[0]
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self.start)

    def talk(self) -> None:
        """Answer line after line."""
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"talking to {self.model}; {HELP}")
        for line in _lines(f"{self.model}> " if interactive else ""):
            if line.startswith("/"):
                if line == "/quit":
                    return
                print(self.order(line))
            elif line:
                self.ask(line)

    def order(self, line: str) -> str:
        """Carry out one /command and say what it did."""
        word, _, name = line.partition(" ")
        if word == "/models":
            return ", ".join(self.names)
        if word == "/new":
            self.messages = list(self.start)
            return "a new conversation"
        if word == "/model" and name in self.names:
            self.model = name
            return f"now talking to {name}"
        return f"no model '{name}'; there is: {', '.join(self.names)}" if word == "/model" else HELP

    def ask(self, text: str) -> None:
        """Send one message and print the answer as it arrives."""
        self.messages.append({"role": "user", "content": text})
        body = {"model": self.model, "messages": self.messages, "stream": True, **self.options}
        answer = ""
        with self.http.stream("POST", "/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise SuiteError(
                    f"the endpoint answered {reply.status_code}: {reply.read().decode(errors='replace')[:500]}"
                )
            for data in _events(reply.iter_lines()):
                for choice in data.get("choices", []):
                    part = choice["delta"].get("content") or ""
                    answer += part
                    print(part, end="", flush=True)
        print()
        self.messages.append({"role": "assistant", "content": answer})


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON payloads of a server-sent event stream."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
