"""Question sets: a folder with a `set.toml` and data, by the name of a shipped one or by path.

    choice       {dev,val}/{subject}_{split}.csv, columns id,question,A,B,C,...,answer: the layout of C-Eval and MMLU
    qa           {subset}.jsonl, rows {"query" or "question", "response" or "answer", "system"?, "lang"?, "id"?}
    perplexity   {subset}.jsonl, rows {"text", "lang"?, "id"?}

Every value is read as a string: `1.10` stays `1.10` and `NA` stays `NA`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from suite import toml
from suite.config import Config, Where, parse
from suite.errors import SuiteError, near

SET_FILE = "set.toml"
SHIPPED = Path(__file__).parent
LETTERS = "ABCDEFGHIJ"
CHINESE = re.compile(r"[\u4e00-\u9fff]")

Language = Literal["en", "zh"]
Kind = Literal["choice", "qa", "perplexity"]

PROMPTS: dict[Kind, dict[str, str]] = {
    "choice": {"en": "{question}\n{options}\nAnswer:", "zh": "{question}\n{options}\n答案："},
    "qa": {"en": "{question}", "zh": "{question}"},
    "perplexity": {},
}


class Generation(Config):
    """What every request of a set carries, so that no endpoint's own defaults decide a score."""

    max_tokens: int = Field(default=256, ge=1)
    """Longest reply in tokens; a reply cut there is counted as truncated."""
    stop: list[str] = Field(default=[])
    """Texts that end a reply."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    seed: int = 0
    """For endpoints that sample."""


class SetFile(Config):
    """The keys of a `set.toml`."""

    kind: Kind
    """choice: one letter is right; qa: a reference text; perplexity: texts to predict."""
    title: str
    """One line for reports."""
    languages: list[Language] = Field(min_length=1)
    """Languages of the questions; with several, each row's own `lang` or its script decides."""
    license: str
    """SPDX name of the data's license."""
    source: str
    """Where the data comes from."""
    prompt: dict[Language, str] = Field(default={})
    """By language, with {question} and, for choice, {options}; C-Eval's form when left out."""
    shots: int = Field(default=0, ge=0)
    """choice: the first rows of dev/{subject}_dev.csv that precede a question as solved examples."""
    metrics: list[Literal["rouge", "bleu", "exact"]] = Field(default=["rouge", "bleu"])
    """qa: what to measure; the first, rouge or exact, gets the interval and decides comparisons."""
    likelihood: bool = False
    """choice: also measure which option's letter is likeliest, at endpoints that give log-probabilities of prompts."""
    generation: Generation = Generation()


@dataclass(frozen=True)
class Question:
    """One thing to ask. `messages` is the chat to complete, or empty for a perplexity `text`.

    `expected` is the right letter or the reference; `letters` are those of the `options`, e.g. "ABCD".
    """

    id: str
    subset: str
    language: Language
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""
    expected: str = ""
    letters: str = ""
    options: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Identity of what is asked and what is right: two reports are compared where these are equal."""
        whole = [self.messages, self.text, self.expected, self.letters]
        return hashlib.sha256(json.dumps(whole, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EvalSet:
    """A set that was found and whose `set.toml` is right; its data is read by `questions`."""

    name: str
    folder: Path
    file: SetFile

    @property
    def kind(self) -> Kind:
        return self.file.kind

    def data_files(self) -> list[Path]:
        """The files that hold questions, in order."""
        if self.kind == "choice":
            return sorted(self.folder.glob("val/*_val.csv"))
        return sorted(self.folder.glob("*.jsonl"))

    @property
    def digest(self) -> str:
        """Hash of set.toml and all data: belongs in the key of whatever is computed from the set."""
        whole = hashlib.sha256()
        for path in (self.folder / SET_FILE, *self.data_files(), *sorted(self.folder.glob("dev/*_dev.csv"))):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            whole.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
        return whole.hexdigest()[:16]

    def questions(self, limit: int | None = None) -> list[Question]:
        """All questions sorted by id, or `limit` of them taken evenly from the subsets; raises SuiteError."""
        found = [q for path in self.data_files() for q in self._read(path)]
        for repeated in _repeated(q.id for q in found):
            raise SuiteError(
                f"two questions have the id '{repeated}'", where=str(self.folder), hint="ids must be unique in a file"
            )
        if limit is not None:
            found = _evenly(found)[:limit]
        if not found:
            raise SuiteError("the set has no questions", where=str(self.folder))
        return sorted(found, key=lambda q: q.id)

    def _read(self, path: Path) -> Iterator[Question]:
        if self.kind == "choice":
            return self._choices(path)
        return self._rows(path)

    def _language(self, row: Mapping[str, str], *texts: str) -> Language:
        if row.get("lang") in ("en", "zh"):
            return "en" if row["lang"] == "en" else "zh"
        if len(self.file.languages) == 1:
            return self.file.languages[0]
        return language_of(*texts)

    def _prompt(self, language: Language) -> str:
        prompts = PROMPTS[self.kind] | self.file.prompt
        return prompts[language]

    def _choices(self, path: Path) -> Iterator[Question]:
        subject = path.stem.removesuffix("_val")
        solved = self._solved(subject)
        for line, row in _csv(path):
            choice = _Choice.read(row, f"{path}:{line}")
            language = self._language(row, choice.question, *choice.options)
            asked = choice.prompt(self._prompt(language))
            messages = (*solved, {"role": "user", "content": asked})
            yield Question(
                f"{subject}/{row.get('id') or line}", subject, language, messages,
                expected=choice.answer, letters=LETTERS[: len(choice.options)],
                options=tuple(choice.options),
            )  # fmt: skip

    def _solved(self, subject: str) -> tuple[dict[str, str], ...]:
        """The few-shot examples of a subject as finished turns."""
        if not self.file.shots:
            return ()
        path = self.folder / "dev" / f"{subject}_dev.csv"
        rows = list(_csv(path)) if path.is_file() else []
        if len(rows) < self.file.shots:
            raise SuiteError(
                f"shots = {self.file.shots}, but {path.relative_to(self.folder)} has {len(rows)} rows",
                where=str(self.folder / SET_FILE), hint="lower shots, or add solved examples",
            )  # fmt: skip
        turns = []
        for line, row in rows[: self.file.shots]:
            choice = _Choice.read(row, f"{path}:{line}")
            asked = choice.prompt(self._prompt(self._language(row, choice.question, *choice.options)))
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": choice.answer}]
        return tuple(turns)

    def _rows(self, path: Path) -> Iterator[Question]:
        for line, row in _jsonl(path):
            where, name = f"{path}:{line}", f"{path.stem}/{row.get('id') or f'{line:05d}'}"
            if self.kind == "perplexity":
                text = _value(row, where, "text")
                yield Question(name, path.stem, self._language(row, text), text=text)
                continue
            question, expected = _value(row, where, "query", "question"), _value(row, where, "response", "answer")
            language = self._language(row, question, expected)
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            content = self._prompt(language).format(question=question)
            messages = (*system, {"role": "user", "content": content})
            yield Question(name, path.stem, language, messages, expected=expected)


def language_of(*texts: str) -> Language:
    """Chinese if there is a Chinese character in any of them."""
    return "zh" if any(CHINESE.search(text) for text in texts) else "en"


@dataclass(frozen=True)
class _Choice:
    """One row of a multiple-choice file."""

    question: str
    options: tuple[str, ...]
    answer: str

    @classmethod
    def read(cls, row: Mapping[str, str], where: str) -> _Choice:
        options = []
        for letter in LETTERS:
            if not row.get(letter):
                break
            options.append(row[letter])
        answer = row["answer"].strip().upper()
        if len(options) < 2:
            raise SuiteError("a question needs at least two options, in columns A, B, ...", where=where)
        if len(answer) != 1 or answer not in LETTERS[: len(options)]:
            hint = f"write one of {', '.join(LETTERS[: len(options)])}; files without answers cannot be scored"
            raise SuiteError(f"answer is '{row['answer']}'", where=where, hint=hint)
        return cls(row["question"], tuple(options), answer)

    def prompt(self, template: str) -> str:
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, self.options, strict=False))
        return template.format(question=self.question, options=listed)


def names() -> list[str]:
    """The sets that come with the suite."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SET_FILE}"))


def load(name: str) -> EvalSet:
    """The shipped set of that name, or the set in that folder; raises SuiteError saying what is wrong with it."""
    folder = SHIPPED / name if name in names() else Path(name)
    path = folder / SET_FILE
    if not path.is_file():
        what = f"the folder {name} has no {SET_FILE}" if folder.is_dir() else f"no question set '{name}'"
        raise SuiteError(what, hint=f"{near(name, names())} (or give a folder with a {SET_FILE})")
    values, lines = toml.read(path)
    file = parse(SetFile, values, _Lines(path, lines))
    found = EvalSet(folder.resolve().name, folder, file)
    _check(found, _Lines(path, lines))
    return found


def load_all(wanted: list[str]) -> list[EvalSet]:
    """Several sets; raises SuiteError where two have one name, or none is wanted."""
    sets = [load(name) for name in wanted]
    if not sets:
        raise SuiteError("no question sets", hint="known: " + ", ".join(names()))
    for name in (*_repeated(s.name for s in sets), *(s.name for s in sets if s.name == "speed")):
        raise SuiteError(f"two sets would be reported as '{name}'", hint="rename the folder of one of them")
    return sets


def _check(found: EvalSet, where: _Lines) -> None:
    file = found.file
    if not found.data_files():
        layout = "val/{subject}_val.csv" if file.kind == "choice" else "*.jsonl"
        raise SuiteError(f"the set has no data: no {layout} in {found.folder}", where=where(()))
    if file.shots and file.kind != "choice":
        raise SuiteError(f"shots are for choice sets, this is a {file.kind} set", where=where(("shots",)))
    if file.kind == "qa" and (not file.metrics or file.metrics[0] == "bleu"):
        hint = "bleu is a figure of the whole set, and intervals need one of each question"
        raise SuiteError("the first metric must be rouge or exact", where=where(("metrics",)), hint=hint)
    needed = {"choice": {"question", "options"}, "qa": {"question"}, "perplexity": set()}[file.kind]
    for language, text in file.prompt.items():
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise SuiteError(
                f"prompt: {error}", where=where(("prompt", language)), hint="a literal brace is {{ or }}"
            ) from None
        if fields != needed:
            hint = "it needs " + " and ".join(f"{{{name}}}" for name in sorted(needed)) if needed else "remove it"
            raise SuiteError(f"prompt has the fields {sorted(fields)}", where=where(("prompt", language)), hint=hint)


@dataclass
class _Lines(Where):
    """Places of keys in one set.toml."""

    file: Path
    lines: Mapping[toml.KeyPath, int]

    def __call__(self, path: tuple[str | int, ...]) -> str:
        known = (self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines)
        line = next(known, None)
        return f"{self.file}:{line}" if line else str(self.file)


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with the line on which each ends; every value a string."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            missing = {"question", "A", "B", "answer"} - set(header)
            if missing:
                hint = "the first line names the columns: id,question,A,B,C,D,answer,explanation"
                raise SuiteError(f"no column {', '.join(sorted(missing))}", where=f"{path}:1", hint=hint)
            for values in reader:
                if len(values) != len(header) and values:
                    what = f"{len(values)} values in a table of {len(header)} columns"
                    raise SuiteError(what, where=f"{path}:{reader.line_num}", hint="quote values that contain commas")
                if values:
                    yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise SuiteError(f"not valid CSV: {error}", where=f"{path}:{reader.line_num}") from None
        except UnicodeDecodeError as error:
            raise SuiteError(f"not UTF-8: {error}", where=str(path)) from None


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SuiteError(f"not valid JSON: {error.msg} at column {error.colno}", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise SuiteError("expected an object {...} on each line", where=f"{path}:{number}")
        yield number, row


def _value(row: Mapping[str, Any], where: str, *names: str) -> str:
    """The first of `names` that the row has; raises SuiteError if it is no text."""
    for name in names:
        if name in row:
            if not isinstance(row[name], str) or not row[name].strip():
                raise SuiteError(f"'{name}' must be a text that is not empty", where=where)
            return str(row[name])
    raise SuiteError(f"no '{names[0]}'", where=where, hint=near(names[0], row))


def _evenly(questions: list[Question]) -> list[Question]:
    """The first question of every subset, then the second of every subset, and so on."""
    turn: Counter[str] = Counter()
    turns = []
    for question in questions:
        turns.append((turn[question.subset], question.subset))
        turn[question.subset] += 1
    return [questions[i] for i in sorted(range(len(questions)), key=turns.__getitem__)]


def _repeated(values: Iterable[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]
