"""`suite chat`: talk to an endpoint; answers appear as they are made, of one model or of several side by side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from suite.commands.answers import Answer, Shown, beside, call_text, scrolling, terminal
from suite.commands.flags import Parser, key_in
from suite.errors import SuiteError, near

HELP = """\
/model NAME     talk to another model or adapter; it sees the conversation so far
/compare A,B    ask several, side by side; each goes on from its own answers
/models         list what the endpoint serves
/system TEXT    set the system message; without TEXT there is none
/retry          ask the last question again
/undo           forget the last question and its answer
/new            a new conversation
/save FILE      append the conversation to FILE as a row of training data (.jsonl)
/quit           end, as Ctrl-D does; Ctrl-C stops an answer"""


def command(verb: str, arguments: list[str]) -> int:
    """Read lines from the terminal (or stdin) until its end."""
    parser = Parser(f"suite {verb}", "Talk to an OpenAI endpoint; /help in the chat lists what it can do.")
    flag = parser.add_argument
    flag("--url", default="http://127.0.0.1:8000", help="the endpoint [http://127.0.0.1:8000]")
    flag("--model", help="the model or adapter to talk to [the endpoint's first]")
    flag("--compare", metavar="A,B", help="models to ask side by side")
    flag("--system", default="", help="system message")
    flag("--temperature", type=float, default=0.0, help="0 always takes the likeliest token [0]")
    flag("--max-tokens", type=int, default=512, help="longest answer in tokens [512]")
    flag("--tools", type=Path, metavar="FILE", help="tools on offer, a JSON list; their results are asked of you")
    flag("--api-key-env", metavar="NAME", help="environment variable that holds the API key [OPENAI_API_KEY if set]")
    given = parser.read(arguments)
    from evalsets.ask import Client

    key = key_in(given.api_key_env) or os.environ.get("OPENAI_API_KEY")
    client = Client(given.url, key, timeout=3600)
    options: dict[str, Any] = {"temperature": given.temperature, "max_tokens": given.max_tokens}
    if given.tools:
        options["tools"] = _tools(given.tools)
    known = list(client.models())
    wanted = given.compare or given.model or next(iter(known), None)
    if wanted is None:
        raise SuiteError(f"{client.root} lists no models", hint="name one with --model")
    talk = Talk(client, known, Conversation(given.system), options, terminal())
    talk.switch(wanted)
    talk.run()
    return 0


def _tools(file: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SuiteError(f"cannot be read: {error}", where=f"--tools {file}") from None
    if not isinstance(tools, list):
        raise SuiteError("holds no JSON list", where=f"--tools {file}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


@dataclass
class Turn:
    """What was said to the models (a question, or the results of tools), and what each answered."""

    given: list[dict[str, Any]]
    answers: dict[str, Answer] = field(default_factory=dict)


@dataclass
class Conversation:
    """All turns. A model that did not answer one sees what another did."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, model: str) -> list[dict[str, Any]]:
        """What a model is sent, or what is saved of it."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found += turn.given
            if turn.answers:
                found.append((turn.answers.get(model) or next(iter(turn.answers.values()))).message)
        return found

    def open_calls(self) -> list[dict[str, Any]]:
        """The tool calls that wait for their results; of several models' answers, none."""
        answers = list(self.turns[-1].answers.values()) if self.turns else []
        return answers[0].calls if len(answers) == 1 else []


@dataclass
class Talk:
    """The loop: lines in, answers out."""

    client: Any
    known: list[str]
    conversation: Conversation
    options: dict[str, Any]
    console: Console
    models: list[str] = field(default_factory=list)

    @property
    def interactive(self) -> bool:
        """Whether a person types, and mistakes are theirs to mend."""
        return sys.stdin.isatty()

    def switch(self, names: str) -> str:
        """Talk to one model, or to several with commas between; raises SuiteError for one that is not there."""
        models = list(dict.fromkeys(name.strip() for name in names.split(",")))
        for model in models:
            if self.known and model not in self.known:
                raise SuiteError(f"no model '{model}' at {self.client.root}", hint=near(model, self.known))
        self.models = models
        return f"now talking to {', '.join(models)}"

    def run(self) -> None:
        """Answer line after line."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() then edits lines and remembers them
            self.console.print(f"talking to {', '.join(self.models)} at {self.client.root}; /help says what you can do")
        for line in self.lines():
            try:
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.order(line)
                elif line:
                    self.ask(self.given(line))
            except SuiteError as error:
                if not self.interactive:
                    raise
                self.console.print(f"error: {error}", style="red")

    def lines(self) -> Iterator[str]:
        """What is typed, until the end of the input."""
        while (line := self.read(f"{','.join(self.models)}> ")) is not None:
            yield line

    def read(self, prompt: str) -> str | None:
        """One line; None at the end of the input."""
        try:
            return input(prompt if self.interactive else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            self.console.print("\n/quit or Ctrl-D ends")
            return ""

    def given(self, line: str) -> list[dict[str, Any]]:
        """The messages that a line stands for: the result of the first open tool call, with those of the others."""
        calls = self.conversation.open_calls()
        if not calls:
            return [{"role": "user", "content": line}]
        results = [line, *(self.read(f"{call_text(call)} gives> ") or "" for call in calls[1:])]
        return [
            {"role": "tool", "tool_call_id": call["id"], "content": result}
            for call, result in zip(calls, results, strict=True)
        ]

    def ask(self, given: list[dict[str, Any]]) -> None:
        """Say something to the models, show what they answer; raises SuiteError when none does."""
        turn = Turn(given)
        self.conversation.turns.append(turn)
        bodies = [
            {"model": model, "messages": self.conversation.messages(model), **self.options} for model in self.models
        ]
        answers = [Answer(model) for model in self.models]
        show = scrolling(self.console) if len(answers) == 1 else beside(self.console, answers)
        with show as shown:
            try:
                asyncio.run(self.stream(bodies, answers, shown))
            except KeyboardInterrupt:
                self.console.print(" (stopped)", style="dim", end="")
        turn.answers = {answer.model: answer for answer in answers if answer.text or answer.calls}
        if not turn.answers:
            self.conversation.turns.pop()
        if answers[0].error and not turn.answers:
            raise SuiteError(answers[0].error)
        if calls := self.conversation.open_calls():
            self.console.print(f"what does {call_text(calls[0])} give?", style="cyan")

    async def stream(self, bodies: list[dict[str, Any]], answers: list[Answer], shown: Shown) -> None:
        """Fill all answers at the same time."""

        async def one(body: dict[str, Any], answer: Answer) -> None:
            try:
                async for event in self.client.stream(session, body):
                    for choice in event.get("choices", []):
                        answer.add(choice.get("delta") or {}, shown)
            except SuiteError as error:
                answer.error = str(error)
            answer.finish(shown)

        async with self.client.session() as session:
            await asyncio.gather(*map(one, bodies, answers))

    def order(self, line: str) -> None:
        """Carry out one /command."""
        word, _, rest = line.partition(" ")
        if word not in ORDERS:
            raise SuiteError(f"no command {word}", hint=near(word, ORDERS))
        if said := ORDERS[word](self, rest.strip()):
            self.console.print(said, soft_wrap=True)

    def set_system(self, text: str) -> str:
        """/system."""
        self.conversation.system = text
        return "the system message is set" if text else "no system message"

    def new(self, _: str) -> str:
        """/new."""
        self.conversation.turns.clear()
        return "a new conversation"

    def pop(self) -> Turn:
        """The last turn, taken away; raises SuiteError where there is none."""
        if not self.conversation.turns:
            raise SuiteError("nothing was said yet")
        return self.conversation.turns.pop()

    def undo(self, _: str) -> str:
        """/undo."""
        return f"forgotten: {self.pop().given[0]['content']}"

    def retry(self, _: str) -> str:
        """/retry; the last answer is kept where there is no new one."""
        last, before = self.pop(), len(self.conversation.turns)
        try:
            self.ask(last.given)
        finally:
            if len(self.conversation.turns) == before:
                self.conversation.turns.append(last)
        return ""

    def save(self, name: str) -> str:
        """/save: one row for each model that is talked to."""
        if not name:
            raise SuiteError("/save needs a file")
        rows = [{"messages": self.conversation.messages(model)} for model in self.models]
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise SuiteError(f"cannot write {name}: {error.strerror}") from None
        return f"saved to {name}"


ORDERS: dict[str, Callable[[Talk, str], str]] = {
    "/model": Talk.switch,
    "/compare": Talk.switch,
    "/models": lambda talk, _: ", ".join(talk.known),
    "/system": Talk.set_system,
    "/retry": Talk.retry,
    "/undo": Talk.undo,
    "/new": Talk.new,
    "/save": Talk.save,
    "/help": lambda *_: HELP,
}
