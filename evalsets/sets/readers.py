"""From rows to questions, for each kind; every mistake has the row's place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from evalsets.extract import number
from evalsets.extract.pattern import compiled
from evalsets.language import Language, language_of
from evalsets.metrics import rules
from evalsets.sets.options import options
from evalsets.sets.question import Question
from evalsets.sets.record import Messages, Record, user
from evalsets.sets.settings import PROMPTS, SEVERAL, SetFile


@dataclass(frozen=True)
class Source:
    """What the rows of a subset are read with: the set's settings, and solved examples as turns.

    `before` counts the lines of the files before, where a subset has several.
    """

    file: SetFile
    subset: str
    solved: Messages = ()
    before: int = 0

    def language(self, row: Record, *texts: str) -> Language:
        """The row's own, the set's only one, or the one of the texts' script."""
        if (said := row.get("lang")) in ("en", "zh"):
            return "en" if said == "en" else "zh"
        return self.file.languages[0] if len(self.file.languages) == 1 else language_of(*texts)

    def prompt(self, language: Language) -> str:
        """The template of what is asked."""
        usual = SEVERAL if self.file.multiple else PROMPTS[self.file.kind]
        return self.file.prompt.get(language, usual[language])

    def id(self, row: Record) -> str:
        """`SUBSET/ID`, by the row's own id or its line."""
        line = self.before + row.line
        return f"{self.subset}/{row.get('id') or (line if self.file.kind == 'choice' else f'{line:05}')}"

    def question(self, row: Record, messages: Messages, stem: str, expected: Any, **more: Any) -> Question:
        """The question of a row, in the language of its stem where nothing else decides."""
        language = more.pop("language", None) or self.language(row, stem)
        return Question(self.id(row), self.subset, language, messages, expected=expected, stem=stem, **more)


def choice(source: Source, row: Record) -> Question:
    """{"question", "A", "B", ..., "answer"}, or {"question", "choices", "answer" or "answerKey"}: up to ten options."""
    forms = ("question", "A", "B") if row.get("choices") is None else ("question",)
    missing = [name for name in forms if row.get(name) is None]
    if missing:
        hint = "the first line names the columns: id,question,A,B,C,D,answer,explanation"
        raise row.error(f"no column {', '.join(missing)}", hint)
    stem, given = row.cell("question"), options(row)
    language = source.language(row, stem, *given.texts)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(given.letters, given.texts, strict=True))
    asked = user(source.prompt(language).format(question=stem, options=listed))
    right = given.right(row, source.file.multiple)
    return source.question(
        row, (*source.solved, asked), stem, right, language=language, letters=given.letters, options=given.texts
    )


def numeric(source: Source, row: Record) -> Question:
    """{"question", "answer", "system"?}, the answer a number or a solution that ends in `#### 72`."""
    stem, answer = row.text("question", "query"), row.text("answer", "response")
    right = number(answer.rpartition("####")[2])
    if right is None:
        raise row.error(f"no number in the answer '{answer[-40:]}'")
    asked = user(source.prompt(source.language(row, stem)).format(question=stem))
    return source.question(row, (*row.before(), *source.solved, asked), stem, right)


def qa(source: Source, row: Record) -> Question:
    """{"query" or "question", "response" or "answer", "system"?, "history"?}, or {"messages", "response"?}.

    Without a response the last message of the assistant is what is expected.
    """
    if row.get("messages"):
        messages = row.conversation()
        if messages[-1]["role"] == "assistant" and not row.get("response") and not row.get("answer"):
            *before, last = messages
            row = Record({**row.values, "messages": before, "response": last.get("content")}, row.file, row.line)
        messages, stem = row.asked()
        expected = row.text("response", "answer")
    else:
        stem, expected = row.text("query", "question"), row.text("response", "answer")
        asked = source.prompt(source.language(row, stem, expected)).format(question=stem)
        messages = (*row.before(), user(asked))
    if "regex" in source.file.metrics:
        _compiled(expected, row)
    return source.question(row, messages, stem, expected, language=source.language(row, stem, expected))


def _compiled(pattern: str, row: Record) -> None:
    try:
        compiled(pattern)
    except ValueError as error:
        raise row.error(f"the response is no regular expression: {error}") from None


def tools(source: Source, row: Record) -> Question:
    """{"query" or "messages", "tools", "calls": [{"name", "arguments"}, ...]}: no calls where none is right.

    `should_call_tool` in place of `calls` (EvalScope's general_fc) asks for any call, or none.
    """
    messages, stem = row.asked()
    offered, should = tuple(_functions(row)), row.get("should_call_tool")
    if row.get("calls") is None and not isinstance(should, bool):
        raise row.error("no 'calls'", '"calls": [{"name": ..., "arguments": {...}}], or []')
    expected = should if row.get("calls") is None else [_call(call, row) for call in row.list("calls")]
    known = {tool["function"]["name"] for tool in offered}
    for call in expected if isinstance(expected, list) else []:
        if call["name"] not in known:
            raise row.error(f"the call of '{call['name']}' is of no offered tool")
    return source.question(row, messages, stem, expected, tools=offered)


def _functions(row: Record) -> Iterator[dict[str, Any]]:
    """The offered tools in OpenAI's form, which may be a JSON text, and may be bare functions."""
    for tool in row.list("tools"):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.error("a tool has no name", '{"type": "function", "function": {"name": ...}}')
        yield {"type": "function", "function": function}


def _call(call: Any, row: Record) -> dict[str, Any]:
    call = call.get("function", call) if isinstance(call, dict) else {}
    arguments = call.get("arguments", {})
    arguments = row.json("arguments", arguments) if isinstance(arguments, str) else arguments
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        raise row.error("a call needs a name and an object of arguments")
    return {"name": call["name"], "arguments": arguments}


def toolbench(source: Source, row: Record) -> Question:
    """{"messages", "tools": [{"name", ...}], "target"}: the target is text with `Action:` and `Action Input:`."""
    messages = tuple(map(_sent, row.conversation()))
    expected = {"target": row.text("target"), "tools": [tool["function"]["name"] for tool in _functions(row)]}
    return source.question(row, messages, str(messages[-1].get("content")), expected)


def _sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message of ToolBench in roles that every endpoint knows: what a function said is told as JSON by the user."""
    plain = {key: value for key, value in message.items() if key != "name"}
    return user(json.dumps(plain, ensure_ascii=False)) if message["role"] == "function" else plain


def instructions(source: Source, row: Record) -> Question:
    """{"query" or "messages", "checks": [{"rule": "words", "most": 5}, ...]}."""
    messages, stem = row.asked()
    checks = row.list("checks") if row.get("checks") else []
    if not checks:
        raise row.error("no 'checks'", '"checks": [{"rule": "words", "most": 5}]')
    for check in checks:
        rules.check(check, row.where)
    return source.question(row, messages, stem, checks)


def refusals(source: Source, row: Record) -> Question:
    """{"query" or "messages", "refuse": true or false}."""
    messages, stem = row.asked()
    if not isinstance(row.get("refuse"), bool):
        raise row.error("no 'refuse' that is true or false")
    return source.question(row, messages, stem, "refuses" if row.get("refuse") else "answers")


def perplexity(source: Source, row: Record) -> Question:
    """{"text"}."""
    text = row.text("text")
    return Question(source.id(row), source.subset, source.language(row, text), text=text)


READERS: dict[str, Callable[[Source, Record], Question]] = {
    "choice": choice, "numeric": numeric, "qa": qa, "tools": tools, "toolbench": toolbench,
    "instructions": instructions, "refusals": refusals, "perplexity": perplexity,
}  # fmt: skip


def solved(source: Source, row: Record) -> Messages:
    """A row as a solved example: the question and its answer as turns."""
    question = READERS[source.file.kind](source, row)
    answer = question.expected if source.file.kind == "choice" else row.text("answer", "response")
    return (question.messages[-1], {"role": "assistant", "content": answer})
