"""From rows to questions, for each kind; every mistake has the row's place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evalsets.extract import number
from evalsets.language import Language, language_of
from evalsets.metrics import rules
from evalsets.sets.question import Question
from evalsets.sets.settings import PROMPTS, SEVERAL, SetFile
from suite.errors import SuiteError, near

LETTERS = "ABCDEFGHIJ"
Row = Mapping[str, Any]
Messages = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Source:
    """What a row of a set is read with: its settings, its subset and the solved examples of that, as turns."""

    file: SetFile
    subset: str
    solved: Messages = ()

    def language(self, row: Row, *texts: str) -> Language:
        """The row's own, the set's only one, or the one of the texts' script."""
        if row.get("lang") in ("en", "zh"):
            return "en" if row["lang"] == "en" else "zh"
        return self.file.languages[0] if len(self.file.languages) == 1 else language_of(*texts)

    def prompt(self, language: Language) -> str:
        usual = SEVERAL if self.file.multiple else PROMPTS[self.file.kind]
        return self.file.prompt.get(language, usual[language])

    def id(self, row: Row, where: str) -> str:
        """`SUBSET/ID`, by the row's own id or its line."""
        line = where.rpartition(":")[2]
        # numbers without zeros for choices, whose files have a header
        return f"{self.subset}/{row.get('id') or (line if self.file.kind == 'choice' else line.zfill(5))}"


def choice(source: Source, row: Row, where: str) -> Question:
    """columns question,A,B,...,answer: up to ten options, read up to the first letter that is missing."""
    stem, options, right = _options(source.file, row, where)
    language = source.language(row, stem, *options)
    content = _listed(source.prompt(language), stem, options)
    return Question(
        source.id(row, where), source.subset, language, (*source.solved, {"role": "user", "content": content}),
        expected=right, letters=LETTERS[: len(options)], options=options, stem=stem,
    )  # fmt: skip


def _options(file: SetFile, row: Row, where: str) -> tuple[str, tuple[str, ...], str]:
    """Question, options and the right letters in alphabetical order."""
    missing = [name for name in ("question", "A", "B") if name not in row]
    if missing:
        hint = "the first line names the columns: id,question,A,B,C,D,answer,explanation"
        raise SuiteError(f"no column {', '.join(missing)}", where=where, hint=hint)
    options = []
    for letter in LETTERS:
        if row.get(letter) in (None, ""):
            break
        options.append(_cell(row, where, letter))
    if len(options) < 2:
        raise SuiteError("a question needs at least two options, in columns A, B, ...", where=where)
    given = row.get("answer")
    named = given if isinstance(given, list) else re.split(r"[\s,;、]+", str(given or "").strip())
    letters = LETTERS[: len(options)]
    right = "".join(sorted(set("".join(map(str, named)).upper())))
    if not right or not set(right) <= set(letters):
        hint = f"write one of {', '.join(letters)}"
        if given in (None, ""):
            hint = "the answers of a test split are often withheld: ask its val split"
        raise SuiteError(f"answer is '{given or ''}'", where=where, hint=hint)
    if len(right) > 1 and not file.multiple:
        raise SuiteError(f"answer is '{given}'", where=where, hint="with several right options, set multiple = true")
    return _cell(row, where, "question"), tuple(options), right


def _cell(row: Row, where: str, column: str) -> str:
    if not isinstance(row[column], str):
        raise SuiteError(f"'{column}' must be a text", where=where)
    return str(row[column])


def _listed(template: str, stem: str, options: tuple[str, ...]) -> str:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return template.format(question=stem, options=listed)


def numeric(source: Source, row: Row, where: str) -> Question:
    """{"question", "answer"}, the answer a number or a solution that ends in `#### 72`."""
    stem, answer = text(row, where, "question", "query"), text(row, where, "answer", "response")
    right = number(answer.rpartition("####")[2])
    if right is None:
        raise SuiteError(f"no number in the answer '{answer[-40:]}'", where=where)
    language = source.language(row, stem)
    messages = (*source.solved, *_system(row), _user(source.prompt(language).format(question=stem)))
    return Question(source.id(row, where), source.subset, language, messages, expected=right, stem=stem)


def qa(source: Source, row: Row, where: str) -> Question:
    """{"query" or "question", "response" or "answer", "system"?, "history"?}, or {"messages", "response"?}.

    Without a response the last message of the assistant is what is expected.
    """
    if row.get("messages"):
        messages = conversation(row, where)
        if messages[-1]["role"] == "assistant" and not row.get("response") and not row.get("answer"):
            *asked, last = messages
            row = {**row, "response": last.get("content")}
            messages = tuple(asked)
        stem = str(messages[-1].get("content")) if messages else ""
        expected = text(row, where, "response", "answer")
        language = source.language(row, stem, expected)
    else:
        stem, expected = text(row, where, "query", "question"), text(row, where, "response", "answer")
        language = source.language(row, stem, expected)
        messages = (*_system(row), *_history(row, where), _user(source.prompt(language).format(question=stem)))
    if "regex" in source.file.metrics:
        _compiled(expected, where)
    return Question(source.id(row, where), source.subset, language, messages, expected=expected, stem=stem)


def _compiled(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise SuiteError(f"the response is no regular expression: {error}", where=where) from None


def tools(source: Source, row: Row, where: str) -> Question:
    """{"query" or "messages", "tools", "calls": [{"name", "arguments"}, ...]}: no calls where none is right.

    `should_call_tool` in place of `calls` (EvalScope's general_fc) asks for any call, or none.
    """
    messages, stem = asked(row, where)
    offered = tuple(_functions(row, where))
    if "calls" in row:
        expected: Any = [_call(call, where) for call in _list(row["calls"], where, "calls")]
        for call in expected:
            if call["name"] not in {tool["function"]["name"] for tool in offered}:
                raise SuiteError(f"the call of '{call['name']}' is of no offered tool", where=where)
    elif isinstance(row.get("should_call_tool"), bool):
        expected = row["should_call_tool"]
    else:
        raise SuiteError("no 'calls'", where=where, hint='"calls": [{"name": ..., "arguments": {...}}], or []')
    language = source.language(row, stem)
    return Question(
        source.id(row, where), source.subset, language, messages, expected=expected, stem=stem, tools=offered
    )


def _functions(row: Row, where: str) -> Iterator[dict[str, Any]]:
    """The offered tools in OpenAI's form, which may be a JSON text, and may be bare functions."""
    for tool in _list(row.get("tools"), where, "tools"):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SuiteError("a tool has no name", where=where, hint='{"type": "function", "function": {"name": ...}}')
        yield {"type": "function", "function": function}


def _call(call: Any, where: str) -> dict[str, Any]:
    call = call.get("function", call) if isinstance(call, dict) else {}
    arguments = call.get("arguments", {})
    arguments = _parsed(arguments, where, "arguments") if isinstance(arguments, str) else arguments
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        raise SuiteError("a call needs a name and an object of arguments", where=where)
    return {"name": call["name"], "arguments": arguments}


def toolbench(source: Source, row: Row, where: str) -> Question:
    """{"messages", "tools": [{"name", ...}], "target"}: the target is text with `Action:` and `Action Input:`."""
    messages = tuple(_sent(message) for message in conversation(row, where))
    listed = [tool.get("function", tool) for tool in _list(row.get("tools"), where, "tools")]
    expected = {"target": text(row, where, "target"), "tools": [str(tool.get("name")) for tool in listed]}
    stem = str(messages[-1]["content"])
    language = source.language(row, stem)
    return Question(source.id(row, where), source.subset, language, messages, expected=expected, stem=stem)


def _sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message of ToolBench in roles that every endpoint knows: what a function said is told as JSON by the user."""
    plain = {key: value for key, value in message.items() if key != "name"}
    if message["role"] == "function":
        return {"role": "user", "content": json.dumps(plain, ensure_ascii=False)}
    return plain


def instructions(source: Source, row: Row, where: str) -> Question:
    """{"query" or "messages", "checks": [{"rule": "words", "most": 5}, ...]}."""
    messages, stem = asked(row, where)
    checks = _list(row.get("checks"), where, "checks")
    if not checks:
        raise SuiteError("no 'checks'", where=where, hint='"checks": [{"rule": "words", "most": 5}]')
    for check in checks:
        rules.check(check, where)
    return Question(
        source.id(row, where), source.subset, source.language(row, stem), messages, expected=checks, stem=stem
    )


def refusals(source: Source, row: Row, where: str) -> Question:
    """{"query" or "messages", "refuse": true or false}."""
    messages, stem = asked(row, where)
    if not isinstance(row.get("refuse"), bool):
        raise SuiteError("no 'refuse' that is true or false", where=where)
    expected = "refuses" if row["refuse"] else "answers"
    return Question(
        source.id(row, where), source.subset, source.language(row, stem), messages, expected=expected, stem=stem
    )


def perplexity(source: Source, row: Row, where: str) -> Question:
    """{"text"}."""
    whole = text(row, where, "text")
    return Question(source.id(row, where), source.subset, source.language(row, whole), text=whole)


Reader = Callable[[Source, Row, str], Question]
READERS: dict[str, Reader] = {
    "choice": choice, "numeric": numeric, "qa": qa, "tools": tools, "toolbench": toolbench,
    "instructions": instructions, "refusals": refusals, "perplexity": perplexity,
}  # fmt: skip


def solved(source: Source, row: Row, where: str) -> Messages:
    """A row as a solved example: the question and its answer as turns."""
    question = READERS[source.file.kind](source, row, where)
    answer = question.expected if source.file.kind == "choice" else text(row, where, "answer", "response")
    return (question.messages[-1], {"role": "assistant", "content": answer})


def asked(row: Row, where: str) -> tuple[Messages, str]:
    """The chat of a row that has a query or messages, and what its last message says."""
    messages = (
        conversation(row, where)
        if row.get("messages")
        else (*_system(row), _user(text(row, where, "query", "question")))
    )
    return messages, str(messages[-1].get("content"))


def conversation(row: Row, where: str) -> Messages:
    """The messages of a row, which may be a JSON text."""
    messages = _list(row.get("messages"), where, "messages")
    if not messages:
        raise SuiteError("no 'messages'", where=where)
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise SuiteError("a message needs a role and content", where=where)
    return tuple(messages)


def _system(row: Row) -> Messages:
    return ({"role": "system", "content": str(row["system"])},) if row.get("system") else ()


def _history(row: Row, where: str) -> Messages:
    """Earlier turns of ms-swift's rows: pairs of what was asked and answered."""
    pairs = _list(row.get("history") or [], where, "history")
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in pairs):
        raise SuiteError("'history' must be pairs of texts", where=where, hint='[["question", "answer"], ...], or []')
    roles = ("user", "assistant")
    return tuple({"role": role, "content": said} for pair in pairs for role, said in zip(roles, pair, strict=True))


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _list(value: Any, where: str, name: str) -> list[Any]:
    found = _parsed(value, where, name) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise SuiteError(f"'{name}' must be a list", where=where)
    return found


def _parsed(value: str, where: str, name: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise SuiteError(f"'{name}' is not valid JSON: {error}", where=where) from None


def text(row: Row, where: str, *names: str) -> str:
    """The first of `names` that the row has; raises SuiteError if it is no text."""
    for name in names:
        if row.get(name) is not None:
            if not isinstance(row[name], str) or not row[name].strip():
                raise SuiteError(f"'{name}' must be a text that is not empty", where=where)
            return str(row[name])
    raise SuiteError(f"no '{names[0]}'", where=where, hint=near(names[0], row))
