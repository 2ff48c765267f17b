"""One row of a data file, read field by field; every mistake has the row's place."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import SuiteError, near

Messages = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Record:
    """The values of a row by column, and its place."""

    values: dict[str, Any]
    file: Path
    line: int

    @property
    def where(self) -> str:
        """Its place for people."""
        return f"{self.file}:{self.line}"

    def error(self, message: str, hint: str = "") -> SuiteError:
        """A mistake in this row, to be raised."""
        return SuiteError(message, where=self.where, hint=hint)

    def get(self, name: str) -> Any:
        """A value, or None where the row has none."""
        return self.values.get(name)

    def text(self, *names: str) -> str:
        """The first of `names` that the row has; raises SuiteError if it is no text."""
        for name in names:
            value = self.get(name)
            if value is not None:
                if not isinstance(value, str) or not value.strip():
                    raise self.error(f"'{name}' must be a text that is not empty")
                return value
        raise self.error(f"no '{names[0]}'", near(names[0], self.values))

    def cell(self, name: str) -> str:
        """A text of a table, which may be white space alone."""
        if not isinstance(value := self.get(name), str):
            raise self.error(f"'{name}' must be a text")
        return value

    def list(self, name: str) -> list[Any]:
        """A list, which may be given as a JSON text."""
        found = self.json(name, value) if isinstance(value := self.get(name), str) else value
        if not isinstance(found, list):
            raise self.error(f"'{name}' must be a list")
        return found

    def json(self, name: str, value: str) -> Any:
        """What a JSON text holds that is, or is inside, the value of `name`."""
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise self.error(f"'{name}' is not valid JSON: {error}") from None

    def asked(self) -> tuple[Messages, str]:
        """The chat of a row that has `messages`, or a `query` (or `question`) and perhaps a `system`, and its stem."""
        if self.get("messages"):
            messages = self.conversation()
            return messages, str(messages[-1].get("content"))
        stem = self.text("query", "question")
        return (*self.before(), user(stem)), stem

    def before(self) -> Messages:
        """What precedes a query: a `system` message and ms-swift's `history`, pairs of what was asked and answered."""
        system = self.get("system")
        pairs = self.list("history") if self.get("history") else []
        if not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in pairs
        ):
            raise self.error("'history' must be pairs of texts", '[["question", "answer"], ...], or []')
        roles = ("user", "assistant")
        turns = [{"role": role, "content": said} for pair in pairs for role, said in zip(roles, pair, strict=True)]
        return (*([{"role": "system", "content": str(system)}] if system else []), *turns)

    def conversation(self) -> Messages:
        """The `messages` of a row, at least one."""
        messages = self.list("messages")
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise self.error("'messages' must be a list of messages, each with a role and content")
        return tuple(messages)


def user(content: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content}
