"""A set that was found, and the way to its questions."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from evalsets.metrics import own
from evalsets.sets import tables
from evalsets.sets.layouts import Layout, Part
from evalsets.sets.question import Question
from evalsets.sets.readers import READERS, Source, solved
from evalsets.sets.record import Messages
from evalsets.sets.settings import Kind, SetFile
from evalsets.sets.subjects import categories
from suite.errors import SuiteError


@dataclass(frozen=True)
class EvalSet:
    """A set whose settings are right; its data is read by `questions`. `where` is its set.toml, or its folder."""

    name: str
    folder: Path
    file: SetFile
    layout: Layout
    where: Path

    @property
    def kind(self) -> Kind:
        return self.file.kind

    @cached_property
    def category(self) -> dict[str, str]:
        """The category of each subset, where all of them are subjects that a publisher put into categories."""
        known, subsets = categories(self.layout.name), [part.subset for part in self.layout.parts]
        return {subset: known[subset] for subset in subsets} if known.keys() >= set(subsets) else {}

    @cached_property
    def digest(self) -> str:
        """Hash of the settings and all data: belongs in the key of whatever is computed from the set."""
        whole = hashlib.sha256(settings(self.file).encode())
        for path in self.layout.files:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            whole.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
        return whole.hexdigest()[:16]

    def questions(self, limit: int | None = None) -> list[Question]:
        """All questions sorted by id, or `limit` of them taken evenly from the subsets; raises SuiteError."""
        found = [question for part in self.layout.parts for question in self._part(part)]
        for repeated in _repeated(q.id for q in found):
            raise SuiteError(
                f"two questions have the id '{repeated}'", where=str(self.folder), hint="ids must be unique in a file"
            )
        if limit is not None:
            found = _evenly(found)[:limit]
        if not found:
            raise SuiteError("the set has no questions", where=str(self.folder))
        return sorted(found, key=lambda q: q.id)

    def _part(self, part: Part) -> Iterator[Question]:
        source, read = Source(self.file, part.subset, self._solved(part)), READERS[self.kind]
        for path in part.paths:
            line = 0
            for row in tables.rows(path, texts=self._texts):
                yield read(source, row)
                line = row.line
            source = replace(source, before=source.before + line)

    def _solved(self, part: Part) -> Messages:
        """The solved examples of a subset as finished turns."""
        shots = self.file.shots
        if not shots:
            return ()
        source = Source(self.file, part.subset)
        rows = [row for path in part.solved for row in tables.rows(path, texts=self._texts)]
        if len(rows) < shots:
            file = part.solved[0].relative_to(self.folder) if part.solved else ""
            has = f"{file} has" if file else f"'{part.subset}' has no dev file:"
            raise SuiteError(
                f"shots = {shots}, but {has} {len(rows)} rows", where=str(self.where),
                hint="lower shots, or add solved examples",
            )  # fmt: skip
        chance = random.Random(f"{self.file.generation.seed} {part.subset}")
        chosen = chance.sample(rows, shots) if self.file.shots_random else rows[:shots]
        return tuple(turn for row in chosen for turn in solved(source, row))

    @property
    def _texts(self) -> bool:
        """Whether a number in a row of JSON is a text, written as it is."""
        return self.kind in ("choice", "numeric")


def settings(file: SetFile) -> str:
    """How a set is asked and scored, where its data lies apart, and with the code of a person's own metrics."""
    code = [own.digest(name) for name in file.metrics if ":" in name]
    return "".join([file.model_dump_json(exclude={"data"}, exclude_defaults=True), *code])


def contradictions(questions: list[Question]) -> list[tuple[Question, Question]]:
    """Pairs of questions that are the same, options in any order, and have different answers."""
    seen: dict[tuple[str, frozenset[str]], Question] = {}
    found = []
    for question in questions:
        same = (" ".join(question.stem.split()), frozenset(question.options))
        other = seen.setdefault(same, question)
        if other is not question and _right(other) != _right(question):
            found.append((other, question))
    return found


def _right(question: Question) -> object:
    """What is right, whatever letter it has."""
    if not question.options:
        return question.expected
    return {
        text for letter, text in zip(question.letters, question.options, strict=True) if letter in question.expected
    }


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
