"""Ollama's Modelfile: written for a model's folder, and read as Ollama reads it.

Its values know no escapes: a text in triple quotes must not hold three quotes in a row, and what cannot be printed is
dropped (but not white space). So everything written here is read back before it is returned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from export.folder import read_json
from suite.errors import SuiteError

Command = tuple[str, str]
"""A command, for PARAMETER and MESSAGE with its name or role ("PARAMETER stop"), and its value."""

SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Ollama's names for what generation_config.json says."""
MOST_CONTEXT = 8192
"""Tokens; the memory for a context is taken when the model starts, and a person may ask for more."""
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
COMMAND = re.compile(r"(?:(PARAMETER)[ \t]+(\w+)|(MESSAGE)[ \t]+(system|user|assistant)|([A-Z]+))[ \t]", re.IGNORECASE)
KNOWN = ("FROM", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "PARAMETER", "MESSAGE")


def commands(
    folder: Path,
    weights: str,
    *,
    stops: Iterable[str],
    longest: int,
    template: str | None = None,
    adapter: str = "",
    system: str = "",
    messages: Sequence[dict[str, str]] = (),
    license_name: str = "",
    context: int | None = None,
) -> list[Command]:
    """The commands for the model in `folder`, whose GGUF file is `weights`.

    `stops` end an answer, `longest` is the model's context in tokens, `context` the one that is asked for. `template`
    is a Go template; without, Ollama uses the Jinja in the GGUF. `adapter` is a GGUF adapter, `messages` stand before
    every conversation. The licence is the folder's, or else its name.
    """
    found = [("FROM", f"./{weights}")]
    found += [("ADAPTER", f"./{adapter}")] if adapter else []
    found += [("TEMPLATE", template)] if template is not None else []
    found += [("SYSTEM", system)] if system else []
    found += [("PARAMETER stop", stop) for stop in stops]
    found += [("PARAMETER " + name, str(value)) for name, value in _sampling(folder).items()]
    found.append(("PARAMETER num_ctx", str(min(longest, context or MOST_CONTEXT))))
    found += [("MESSAGE " + message["role"], message["content"]) for message in messages]
    licence = license_text(folder) or license_name
    return [*found, ("LICENSE", licence)] if licence else found


def write(given: Sequence[Command], notes: Sequence[str] = ()) -> str:
    """The Modelfile, with `notes` as comments before it; raises SuiteError for a value that it cannot hold."""
    comments = [f"# {line}".rstrip() for note in notes for line in note.splitlines()]
    lines = [f"{command} {_quoted(command, value)}" for command, value in given]
    text = "\n".join([*comments, *lines]) + "\n"
    if parse(text) != list(given):
        raise SuiteError("Ollama would read the Modelfile otherwise than it is meant", where="Modelfile")
    return text


def parse(text: str) -> list[Command]:
    """The commands of a Modelfile, read as Ollama does; raises SuiteError with the line of a mistake."""
    found: list[Command] = []
    position = 0
    while position < len(text):
        if text[position] in " \t\r\n":
            position += 1
        elif text[position] == "#":
            position = _end_of_line(text, position)
        else:
            match = COMMAND.match(text, position)
            name = (match[1] or match[3] or match[5]).upper() if match else ""
            if not match or name not in KNOWN or (match[5] and name in ("PARAMETER", "MESSAGE")):
                raise _wrong("no command that is known here", text, position)
            value, position = _value(text, match.end())
            found.append((" ".join(filter(None, (name, match[2] or match[4]))), value))
    if not any(command == "FROM" for command, _ in found):
        raise _wrong("no FROM line", text, len(text))
    return found


def license_text(folder: Path) -> str:
    """The text of the licence that lies in `folder`, without what a Modelfile cannot hold; empty without one."""
    for name in LICENSES:
        if (folder / name).is_file():
            text = (folder / name).read_text("utf-8", errors="replace").replace('"""', "'''")
            return "".join(char for char in text if char.isprintable() or char in "\n\t").strip()
    return ""


def _sampling(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    if not settings.get("do_sample", False):
        return {"temperature": 0}
    return {new: settings[old] for old, new in SAMPLING.items() if settings.get(old) is not None}


def _quoted(command: str, value: str) -> str:
    """`value` in the quotes that it needs."""
    if command.split()[0] == "FROM" or re.fullmatch(r"-?[\w.]+", value):
        return value
    unprintable = next((char for char in value if not char.isprintable() and char not in "\n\t"), None)
    if unprintable or '"""' in value:
        what = f"the character {unprintable!r}" if unprintable else "three quotes in a row"
        raise SuiteError(
            f"{command} holds {what}, which a Modelfile cannot", where="Modelfile", hint="write the text without"
        )
    quotes = '"""' if "\n" in value or '"' in value else '"'
    return f"{quotes}{value}{quotes}"


def _value(text: str, start: int) -> tuple[str, int]:
    """The value from `start` to the first end of a line where its quotes are closed, and where the next line begins."""
    read = ""
    for position in range(start, len(text) + 1):
        char = text[position : position + 1]
        if char in ("\n", "\r", "") and (value := _unquoted(read.strip())) is not None:
            return value, position + 1
        read += char if char in " \t\r\n" or char.isprintable() else ""
    raise _wrong("quotes that are not closed", text, start)


def _unquoted(text: str) -> str | None:
    """The text inside quotes; None while they are open."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def _end_of_line(text: str, position: int) -> int:
    ends = [end for end in (text.find("\n", position), text.find("\r", position)) if end >= 0]
    return min(ends, default=len(text))


def _wrong(what: str, text: str, position: int) -> SuiteError:
    return SuiteError(what, where=f"Modelfile:{text.count(chr(10), 0, position) + 1}")
