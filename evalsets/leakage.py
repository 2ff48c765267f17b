"""Leakage: which questions of an evaluation stand in the data that the model learnt from?

A question overlaps when a run of 13 of its tokens stands in a training text (Brown et al. 2020, arXiv:2005.14165,
appendix C: lower case, no punctuation); of a shorter question 8 tokens, the least that is used there, and of one
shorter than that, all. A token is a word, a sign of arithmetic before a number or, where words are not set apart, a
Chinese, Japanese or Korean character. What all questions of a set begin or end with (the prompt's form) does not count,
nor do runs that several share. Of a question whose answer is a number, the text must have all numbers too: with others
it is another question.

Memory holds the questions' runs; the data is streamed.
"""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

LONG, SHORT, SHORTEST = 13, 8, 4
"""Tokens of a run, of a run in a question shorter than that, and of the shortest question that can be recognised."""
CHUNK = 1 << 20
CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+|[+*/×÷−](?=\s*\d)|-(?= \d)")
NUMBER = re.compile(r"\d|[〇零一二两三四五六七八九十百千万亿]")
EXAMPLES = ("choice", "numeric", "external")
"""Kinds whose prompts may have solved examples before the question; those of others are one conversation."""
OPTION = re.compile(r"^\s*\(?[A-J][.:)、．：].*$", re.MULTILINE)
BETWEEN = re.compile(r"[\s,\[\]]*")

Progress = Callable[[float, float, str], None]
Row = dict[str, Any]


def tokens(text: str) -> list[str]:
    """Lower-case words, signs before numbers and single CJK characters, without punctuation, in one width.

    >>> tokens("What's 2+2？你好")
    ['what', 's', '2', '+', '2', '你', '好']
    """
    return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


class Runs:
    """The runs of tokens by which the questions of some groups are recognised; a group is texts by id, of one form.

    `numeric` are the groups whose questions are others with other numbers.
    """

    def __init__(self, groups: Sequence[Mapping[str, str]], numeric: Collection[int] = ()) -> None:
        self.too_short = [0] * len(groups)
        self.questions: dict[int, list[tuple[int, str]]] = defaultdict(list)
        self.begins: dict[int, set[str]] = defaultdict(set)
        self.numbers: dict[tuple[int, str], set[str]] = {}
        for number, texts in enumerate(groups):
            split = _without_form({name: tokens(text) for name, text in texts.items()})
            runs = {name: set(_runs(words)) for name, words in split.items() if len(words) >= SHORTEST}
            self.too_short[number] = len(split) - len(runs)
            if number in numeric:
                self.numbers |= {(number, name): set(filter(NUMBER.match, split[name])) for name in runs}
            shared = Counter(run for found in runs.values() for run in found)
            for name, found in runs.items():
                for run in {run for run in found if shared[run] == 1} or found:
                    self.questions[hash(run)].append((number, name))
                    self.begins[len(run)].add(run[0])

    def found_in(self, words: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Group and id of the questions that have a run in these tokens."""
        for length, begins in self.begins.items():
            for i in range(len(words) - length + 1):
                if words[i] in begins and (found := self.questions.get(hash(tuple(words[i : i + length])))):
                    yield from (each for each in found if self.numbers.get(each, set()).issubset(words))


def _runs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    length = LONG if len(words) >= LONG else SHORT if len(words) >= SHORT else len(words)
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def _without_form(split: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The tokens without those that all questions begin or end with."""
    several = {tuple(words) for words in split.values()}
    if len(several) < 2:
        return dict(split)
    first = _shared(several)
    last = _shared(words[first:][::-1] for words in several)
    return {name: words[first : len(words) - last] for name, words in split.items()}


def _shared(lists: Iterable[Sequence[str]]) -> int:
    """How many tokens all of them begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False)))


def overlapping(runs: Runs, files: Sequence[Path], progress: Progress = lambda *_: None) -> set[tuple[int, str]]:
    """Group and id of the questions that overlap with a row of the files, .json or .jsonl."""
    found: set[tuple[int, str]] = set()
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        for position, row in rows(file):
            for text in strings(row):
                found.update(runs.found_in(tokens(text)))
            progress(done + position, total, "leakage")
        done += file.stat().st_size
    return found


def strings(value: Any) -> Iterator[str]:
    """Every text in a row, whatever its form."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The objects of JSON lines, or of one JSON list, each with about how many bytes were read; one chunk in memory."""
    decode = json.JSONDecoder().raw_decode
    with file.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig") as opened:
        waiting = ""
        while chunk := opened.read(CHUNK):
            waiting, at = waiting + chunk, 0
            while True:
                between = BETWEEN.match(waiting, at)
                at = between.end() if between else at
                try:
                    value, at = decode(waiting, at)
                except json.JSONDecodeError:  # its end is in the next chunk
                    break
                yield raw.tell(), value
            waiting = waiting[at:]


def annotate(
    sets: Mapping[str, dict[str, Any]], answers: Mapping[str, Sequence[Row]], files: Sequence[Path],
    unknown: Sequence[str], progress: Progress = lambda *_: None,
) -> None:  # fmt: skip
    """Put `leakage` into each of a report's `sets` and into its total; `answers` are the rows by set.

    In a total: the `n` questions that overlap with the `files` of training data, their `share`, and `clean`, the mean
    score (or perplexity) of the others, None where there are none; "not_available" without any file. In the set: their
    "ids", how many were "too_short" to be recognised, how many "files" were read, and what is "unknown" of the training
    data.
    """
    groups: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # the form of a prompt is that of a language
    for name, found in answers.items():
        for row in found:
            groups[name, row["language"]][row["id"]] = _question(row, sets[name]["kind"])
    numeric = [number for number, (name, _) in enumerate(groups) if sets[name]["kind"] == "numeric"]
    runs = Runs(list(groups.values()), numeric)
    names = [name for name, _ in groups]
    leaked: dict[str, set[str]] = defaultdict(set)
    for number, question in overlapping(runs, files, progress):
        leaked[names[number]].add(question)
    too_short: Counter[str] = Counter()
    for name, count in zip(names, runs.too_short, strict=True):
        too_short[name] += count
    for name, found in answers.items():
        if not found:
            continue
        clean = _score(sets[name]["kind"], [row for row in found if row["id"] not in leaked[name]])
        n = len(leaked[name])
        known = {"n": n, "share": n / len(found), "clean": clean}
        why = "no training data is at hand" + "".join(f"; {reason}" for reason in unknown)
        sets[name]["total"]["leakage"] = known if files else {"not_available": why}
        sets[name]["leakage"] = {
            "ids": sorted(leaked[name]), "too_short": too_short[name], "files": len(files), "unknown": list(unknown),
        }  # fmt: skip


def _question(row: Row, kind: str) -> str:
    """What is asked, in all turns of a conversation, without solved examples, system texts and options."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return OPTION.sub("", prompt) or prompt
    turns = prompt[-1:] if kind in EXAMPLES else [turn for turn in prompt if turn["role"] == "user"]
    text = "\n".join(string for turn in turns for string in strings(turn.get("content")))
    return OPTION.sub("", text) or text


def _score(kind: str, found: Sequence[Row]) -> float | None:
    if kind != "perplexity":
        scores = [row["score"] for row in found if row["score"] is not None]
        return fmean(scores) if scores else None
    answered = [row for row in found if not row["error"]]
    return math.exp(math.fsum(r["nll"] for r in answered) / sum(r["tokens"] for r in answered)) if answered else None


def said(found: Mapping[str, Any], headline: str) -> str:
    """One sentence about the leakage of a set, for people."""
    if "leakage" not in found:
        return "Leakage is not known: no question was looked for in training data."
    total, known = found["total"]["leakage"], found["leakage"]
    if "not_available" in total:
        return f"Leakage is not known: {total['not_available']}."
    n, unknown = total["n"], f"; unknown: {', '.join(known['unknown'])}" if known["unknown"] else ""
    clean = f", {headline} on the others {total['clean']:.4g}" if n and total["clean"] is not None else ""
    short = f"; {known['too_short']} are too short to be recognised" if known["too_short"] else ""
    return (
        f"Leakage: {n} questions ({100 * total['share']:.1f} %) overlap with the training data{clean}{short}{unknown}."
    )
