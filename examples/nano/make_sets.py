"""Write the shipped question sets and the quickstart's data: `python examples/nano/make_sets.py [ROOT]`.

    evalsets/ceval-mini     four-choice questions in C-Eval's layout, held out from nano's training
    evalsets/summaries      little stories and their summaries, held out too
    evalsets/perplexity     short texts: held-out stories and sums, and facts in new combinations
    examples/data           identity, style and calibration rows for the quickstart, from the training side

All of it comes from the world and the generators of nano's own data. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from make_data import (
    LETTERS,
    Choice,
    Sample,
    conversation,
    draw,
    exchange,
    fact_choice,
    is_held_out,
    sum_choice,
    write,
)
from world import NEW_IDENTITY

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
    """Held-out stories and their summaries, the languages in turn."""
    for number in range(count):
        sample = draw(rng, number % 2, "summaries", held_out=True)
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
    sets, data = args.root / "evalsets", args.root / "examples" / "data"
    for folder in (sets / "summaries", sets / "perplexity", data):
        folder.mkdir(parents=True, exist_ok=True)
    write_choices(sets / "ceval-mini", rng)
    write(sets / "summaries" / "stories.jsonl", stories(rng, 40))
    write(sets / "perplexity" / "texts.jsonl", texts(random.Random(args.seed), 40))
    write(data / "identity.jsonl", identity(rng))
    write(data / "style.jsonl", style(rng, 180))
    write(data / "calibration.jsonl", (conversation(rng) for _ in range(256)))


if __name__ == "__main__":
    main()
