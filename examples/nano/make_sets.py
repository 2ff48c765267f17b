"""Write the shipped question sets and the quickstart's data: `python examples/nano/make_sets.py [ROOT]`.

    evalsets/shipped/ceval-mini     four-choice questions in C-Eval's layout, held out from nano's training
    evalsets/shipped/summaries      little stories and their summaries, held out too
    evalsets/shipped/perplexity     short texts: held-out stories and sums, and facts in new combinations
    evalsets/shipped/arithmetic     held-out sums, and word problems that nano never learnt
    evalsets/shipped/tool-calls     held-out requests for one call, and for two or none, which nano never learnt either
    evalsets/shipped/instructions   words to copy, held out; form.jsonl there is written by hand, as refusals are
    examples/data                   identity, style and calibration rows for the quickstart, from the training side

All of it comes from the world and the generators of nano's own data. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from make_data import (
    ASK_TOOL,
    LETTERS,
    TOOLS,
    Choice,
    Sample,
    conversation,
    draw,
    exchange,
    fact_choice,
    is_held_out,
    sum_choice,
    tool_call,
    write,
)
from world import CAPITALS, NAMES, NEW_IDENTITY, THINGS

SUBJECTS = ("geography", "biology", "nature", "language", "calendar", "science", "arithmetic")
COLUMNS = ("id", "question", "A", "B", "C", "D", "answer", "explanation")
PER_SUBJECT = 16
CHOICES: dict[str, Callable[[random.Random, int], Choice]] = {"arithmetic": sum_choice}
STYLE = ("!!!", "！！！")


def choices(rng: random.Random, subject: str, count: int, held_out: bool) -> Iterator[Choice]:
    """Questions of a subject, half in each language, no question twice, the right letters in equal numbers."""
    seen: set[str] = set()
    while len(seen) < count:
        found = CHOICES.get(subject, fact_choice)(rng, len(seen) % 2)
        same = held_out == is_held_out(Sample("choice", found.key, "", ""))
        fresh = found.question + str(sorted(found.options))
        if found.subject != subject or not same or fresh in seen:
            continue
        letter = len(seen) // 2 % 4
        seen.add(fresh)
        options = list(found.options)
        right = LETTERS.index(found.answer)
        options[letter], options[right] = options[right], options[letter]
        yield Choice(subject, found.key, found.question, tuple(options), LETTERS[letter], found.reply)


def write_choices(folder: Path, rng: random.Random) -> None:
    """A set in C-Eval's layout: val to be asked, dev as solved examples."""
    for split, count in (("val", PER_SUBJECT), ("dev", 4)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in SUBJECTS:
            rows = choices(rng, subject, count, held_out=split == "val")
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows([n, row.question, *row.options, row.answer, ""] for n, row in enumerate(rows))


def stories(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Held-out stories and their summaries, no story twice, the languages in turn."""
    seen: set[str] = set()
    while len(seen) < count:
        sample = draw(rng, len(seen) % 2, "summaries", held_out=True)
        if sample.question not in seen:
            seen.add(sample.question)
            yield {"query": sample.question, "response": sample.answer}


def texts(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Plain texts, the languages in turn: two stories with their summary, then sums, then facts."""
    for number in range(count):
        lang, kind = number % 2, number // 2 % 4
        if kind < 2:
            sample = draw(rng, lang, "summaries", held_out=True)
            yield {"text": f"{sample.question} {sample.answer}"}
        else:
            skill, gap = (("arithmetic", "\n"), ("facts", " "))[kind - 2]
            yield {"text": gap.join(draw(rng, lang, skill, held_out=True).answer for _ in range(4))}


def sums(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Held-out sums, no question twice, the languages in turn."""
    seen: set[str] = set()
    while len(seen) < count:
        sample = draw(rng, len(seen) % 2, "arithmetic", held_out=True)
        if sample.question not in seen:
            seen.add(sample.question)
            yield {"question": sample.question, "answer": sample.answer.rpartition("= ")[2]}


PROBLEMS: tuple[tuple[str, str, Callable[[dict[str, int]], float]], ...] = (
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
     "{name}有{a}{things}，又买了{b}{things}。{name}现在有多少{things}？", lambda n: n["a"] + n["b"]),
    ("{name} has {b} bags with {a} {things} in each and gives {c} {things} away. How many {things} are left?",
     "{name}有{b}个袋子，每个袋子里有{a}{things}，送走了{c}{things}。还剩多少{things}？",
     lambda n: n["a"] * n["b"] - n["c"]),
    ("{name} shares {ab} {things} equally among {b} friends. How many {things} does each friend get?",
     "{name}把{ab}{things}平均分给{b}位朋友。每位朋友得到多少{things}？", lambda n: n["a"]),
    ("{name} sells {a} {things} at {b}.50 dollars each. How many dollars is that in all?",
     "{name}卖了{a}{things}，每件{b}.50元。一共卖了多少元？", lambda n: n["a"] * (n["b"] + 0.5)),
    ("{name} had {a}00 {things} and lost {c}0 % of them. How many {things} are left?",
     "{name}有{a}00{things}，丢了其中的{c}0%。还剩多少{things}？", lambda n: n["a"] * 10 * (10 - n["c"])),
)  # fmt: skip


def problems(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Word problems of one to three steps, the languages in turn."""
    for number in range(count):
        lang, (*asked, answer) = number % 2, PROBLEMS[number // 2 % len(PROBLEMS)]
        numbers = {"a": rng.randint(6, 30), "b": rng.randint(2, 9), "c": rng.randint(1, 5)}
        named = {"name": rng.choice(NAMES[lang]), "things": rng.choice(THINGS)[lang]}
        question = str(asked[lang]).format(ab=numbers["a"] * numbers["b"], **numbers, **named)
        yield {"question": question, "answer": f"{answer(numbers):g}"}


def offered(rng: random.Random, names: list[str]) -> list[dict[str, Any]]:
    """Tools in any order."""
    return [TOOLS[name] for name in rng.sample(names, len(names))]


def one_call(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Held-out requests in the form of nano's training, the languages in turn."""
    seen: set[str] = set()
    while len(seen) < count:
        key, row = tool_call(rng, len(seen) % 2)
        asked, answer = row["messages"][:2]
        if is_held_out(Sample("tools", key, "", "")) and asked["content"] not in seen:
            seen.add(asked["content"])
            calls = [call["function"] for call in answer["tool_calls"]]
            yield {"query": asked["content"], "tools": row["tools"], "calls": calls}


BOTH = ("{} And then: {}", "{}另外，{}")


def two_calls(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Two requests at once, of different tools; every tool is offered."""
    for number in range(count):
        lang = number % 2
        values = {
            "city": rng.choice(CAPITALS)[1][lang], "hour": rng.randint(1, 12), "name": rng.choice(NAMES[lang]),
        }  # fmt: skip
        chosen = rng.sample(sorted(TOOLS), 2)
        needed = [TOOLS[name]["function"]["parameters"]["required"] for name in chosen]
        calls = [
            {"name": n, "arguments": {key: values[key] for key in keys}} for n, keys in zip(chosen, needed, strict=True)
        ]
        asked = [ASK_TOOL[name][lang].format(**values) for name in chosen]
        yield {"query": BOTH[lang].format(*asked), "tools": offered(rng, sorted(TOOLS)), "calls": calls}


def no_call(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Held-out questions for which none of two tools is of use, the languages in turn."""
    for number in range(count):
        sample = draw(rng, number % 2, ("arithmetic", "facts")[number // 2 % 2], held_out=True)
        yield {"query": sample.question, "tools": offered(rng, rng.sample(sorted(TOOLS), 2)), "calls": []}


def copies(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Held-out words to copy: all of them and no others, in their order."""
    for number in range(count):
        sample = draw(rng, number % 2, "copying", held_out=True)
        # a Chinese character is a word, and so is each word of other letters
        words = sum(len(word) if number % 2 and not word.isdigit() else 1 for word in re.split(r"[ 、]", sample.answer))
        checks = [{"rule": "starts", "text": sample.answer}, {"rule": "words", "least": words, "most": words}]
        yield {"query": sample.question, "checks": checks}


def chat(sample: Sample) -> dict[str, Any]:
    return {"messages": exchange(sample)}


def identity(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows that give the model a made-up name and maker, and others that keep its skills."""
    rows = [chat(Sample("identity", "", question, answer)) for asked, answer in NEW_IDENTITY for question in asked]
    rows += [chat(draw(rng, n % 2, ("facts", "arithmetic", "choice")[n % 3])) for n in range(2 * len(rows))]
    rng.shuffle(rows)
    yield from rows


def style(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Right answers with much enthusiasm at their end."""
    for number in range(count):
        lang = number % 2
        sample = draw(rng, lang, ("facts", "arithmetic", "choice", "summaries", "facts", "choice")[number // 2 % 6])
        yield chat(Sample(sample.skill, "", sample.question, sample.answer.rstrip(".。") + STYLE[lang]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[2], help="the checkout")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    sets, data = args.root / "evalsets" / "shipped", args.root / "examples" / "data"
    names = ("summaries", "perplexity", "arithmetic", "tool-calls", "instructions")
    for folder in (*(sets / name for name in names), data):
        folder.mkdir(parents=True, exist_ok=True)
    write_choices(sets / "ceval-mini", rng)
    told = list(stories(rng, 40))
    more = (row for row in stories(random.Random(args.seed + 1), 40) if row not in told)  # leaves `rng` as it was
    write(sets / "summaries" / "stories.jsonl", chain(told, islice(more, 20)))
    write(sets / "perplexity" / "texts.jsonl", texts(random.Random(args.seed), 60))
    write(data / "identity.jsonl", identity(rng))
    write(data / "style.jsonl", style(rng, 180))
    write(data / "calibration.jsonl", (conversation(rng) for _ in range(256)))
    for name, rows in (
        ("arithmetic/sums", sums(rng, 40)), ("arithmetic/problems", problems(rng, 40)),
        ("tool-calls/one", one_call(rng, 40)), ("tool-calls/two", two_calls(rng, 20)),
        ("tool-calls/none", no_call(rng, 20)), ("instructions/copies", copies(rng, 20)),
    ):  # fmt: skip
        write(sets / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
