"""Write nano's training data and its held-out questions: `python examples/nano/make_data.py OUT [--rows N] [--seed S]`.

OUT gets `lists.jsonl` (lists that repeat, from which a model learns first and fast to look back), `world.jsonl`
(conversations, texts and some lists), `chat.jsonl` (conversations alone), `drill.jsonl` (sums and lists to repeat) and
`held_out.jsonl` (questions of every skill that training never sees). What is held out is decided by a hash of what the
question is about, e.g. the operands of a sum, so no wording and no language of it slips into training. The same seed
gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from world import (
    ACTIONS,
    DAYS,
    IDENTITY,
    MONTHS,
    NAMES,
    NUMBERS,
    PLACES,
    RELATIONS,
    SYSTEMS,
    THINGS,
    WEATHER,
    WORDS,
    Relation,
)

EN, ZH = 0, 1
LETTERS = "ABCD"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One exchange. `key` is what it is about: samples with one key are all held out or all trained on."""

    skill: str
    key: str
    question: str
    answer: str


def is_held_out(sample: Sample) -> bool:
    """Whether a sample is kept from training: one key in ten, and none without a key."""
    return bool(sample.key) and hashlib.sha256(sample.key.encode()).digest()[0] < 26


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


POOL = tuple(list(dict.fromkeys(w[lang] for w in (*WORDS, *DAYS, *MONTHS, *PLACES, *NUMBERS))) for lang in (EN, ZH))
"""Words of both languages for lists and options."""

# ---- skills: each draws one sample in one language ------------------------------------------------------------------


def fact(rng: random.Random, lang: int) -> Sample:
    """A fact in one of its wordings. Every fact is trained on, one wording in ten of it is held out."""
    relation = rng.choice(RELATIONS)
    x, y = rng.choice(relation.pairs)
    wording = rng.randrange(len(relation.questions[lang]))
    question = relation.questions[lang][wording].format(x=x[lang])
    return Sample("facts", f"{relation.name}/{x[EN]}/{lang}/{wording}", question, statement(relation, x, y, lang))


def statement(relation: Relation, x: tuple[str, str], y: tuple[str, str], lang: int) -> str:
    """A fact as a sentence."""
    return capital(relation.answer[lang].format(x=x[lang], y=y[lang]))


def operation(rng: random.Random) -> tuple[int, str, int, int]:
    """A small sum, difference or product: a, operator, b, result."""
    operator = rng.choice("++--×")
    if operator == "×":
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return a, operator, b, a * b
    a, b = rng.randint(0, 20), rng.randint(0, 10)
    if operator == "+":
        return a, operator, b, a + b
    return max(a, b), operator, min(a, b), abs(a - b)


SUMS = (
    ("What is {} {} {}?", "Calculate {} {} {}.", "{} {} {} = ?"),
    ("{} {} {} 等于多少？", "请计算 {} {} {}。", "{} {} {} = ?"),
)


def arithmetic(rng: random.Random, lang: int) -> Sample:
    """A small sum, difference or product."""
    a, operator, b, result = operation(rng)
    question = rng.choice(SUMS[lang]).format(a, operator, b)
    return Sample("arithmetic", f"{a}{operator}{b}", question, f"{a} {operator} {b} = {result}")


COPIES = (("Repeat: {}", "Copy these words: {}", "Say exactly: {}"), ("请重复：{}", "请照抄：{}", "请原样说：{}"))


def copying(rng: random.Random, lang: int) -> Sample:
    """Two to six words to repeat in order."""
    words = (" " if lang == EN else "、").join(rng.sample(POOL[lang], rng.randint(2, 6)))
    return Sample("copying", words, rng.choice(COPIES[lang]).format(words), words)


EVENTS = (
    (
        "On {day}, {name} went to the {place}. It was {weather}. {name} {did} {n} {things} and then went home.",
        "{name} likes the {place}. On {day} {name} was there and {did} {n} {things}. The weather was {weather}.",
        "It was {weather} on {day}. {name} came to the {place}, and {name} {did} {n} {things}.",
    ),
    (
        "{day}，{name}去了{place}。天气是{weather}。{name}在那里{did}{n}{things}，然后回家了。",
        "{name}喜欢{place}。{day}{name}在那里{did}{n}{things}。天气是{weather}。",
        "{day}是{weather}。{name}来到{place}，{did}{n}{things}。",
    ),
)
SUMMARIES = ("On {day}, {name} {did} {n} {things} at the {place}.", "{day}{name}在{place}{did}{n}{things}。")
ASK_SUMMARY = (
    ("Summarize in one sentence: {}", "Give a short summary: {}", "{} What happened?"),
    ("用一句话概括：{}", "请简短概括：{}", "{}发生了什么？"),
)


def event(rng: random.Random, lang: int) -> tuple[str, str]:
    """A little story and its summary."""
    drawn = {"day": DAYS, "place": PLACES, "weather": WEATHER, "did": ACTIONS, "n": NUMBERS, "things": THINGS}
    values = {slot: rng.choice(words)[lang] for slot, words in drawn.items()} | {"name": rng.choice(NAMES[lang])}
    return rng.choice(EVENTS[lang]).format(**values), SUMMARIES[lang].format(**values)


def summary(rng: random.Random, lang: int) -> Sample:
    """A little story to put in one sentence."""
    story, short = event(rng, lang)
    return Sample("summaries", short, rng.choice(ASK_SUMMARY[lang]).format(story), short)


def identity(rng: random.Random, lang: int) -> Sample:
    """Who nano is, and greetings."""
    half = len(IDENTITY) // 2
    questions, answer = rng.choice(IDENTITY[:half] if lang == EN else IDENTITY[half:])
    question = rng.choice(questions)
    return Sample("identity", "", question, answer)


# ---- four-choice questions, as C-Eval asks them ---------------------------------------------------------------------

CHOICES = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n"
ASK_CHOICE = (
    (CHOICES + "Answer:", "Question: " + CHOICES + "Answer:", CHOICES + "Which option is right?"),
    (CHOICES + "答案：", "问题：" + CHOICES + "答案：", CHOICES + "哪一项是对的？"),
)


@dataclass(frozen=True)
class Choice:
    """A question with four options, one of them right."""

    subject: str
    key: str
    question: str
    options: tuple[str, ...]
    answer: str
    reply: str

    def sample(self, rng: random.Random, lang: int) -> Sample:
        """The question as a person would ask it; the reply is a sentence, for a letter is beyond so small a model."""
        filled = dict(zip(LETTERS, self.options, strict=True), question=self.question)
        return Sample("choice", self.key, rng.choice(ASK_CHOICE[lang]).format(**filled), self.reply)


def choose(
    rng: random.Random, subject: str, key: str, question: str, right: str, wrong: list[str], reply: str
) -> Choice:
    """The right answer and three wrong ones in random order."""
    options = [right, *rng.sample(sorted(set(wrong) - {right}), 3)]
    rng.shuffle(options)
    key = key or f"{right}/{sorted(options)}"
    return Choice(subject, key, question, tuple(options), LETTERS[options.index(right)], reply)


def fact_choice(rng: random.Random, lang: int) -> Choice:
    """A fact with three wrong answers of its kind."""
    relation = rng.choice(RELATIONS)
    x, y = rng.choice(relation.pairs)
    wrong = [other[lang] for _, other in relation.pairs] + [option[lang] for option in relation.options]
    question = rng.choice(relation.questions[lang][:2]).format(x=x[lang])
    return choose(rng, relation.subject, "", question, y[lang], wrong, statement(relation, x, y, lang))


def sum_choice(rng: random.Random, lang: int) -> Choice:
    """A small calculation with three wrong results near the right one."""
    a, operator, b, result = operation(rng)
    near = [str(n) for n in range(max(0, result - 5), result + 6) if n != result]
    question = rng.choice(SUMS[lang]).format(a, operator, b)
    reply = f"{a} {operator} {b} = {result}"
    return choose(rng, "arithmetic", f"{a}{operator}{b}", question, str(result), near, reply)


def things(rng: random.Random, lang: int, count: int) -> list[str]:
    """Different words or numbers."""
    if rng.random() < 0.3:
        return [str(number) for number in rng.sample(range(100), count)]
    return rng.sample(POOL[lang], count)


CHOICES_OF: tuple[Callable[[random.Random, int], Choice], ...] = (fact_choice, fact_choice, sum_choice)


def choice(rng: random.Random, lang: int) -> Sample:
    """A four-choice question answered by a sentence."""
    return rng.choice(CHOICES_OF)(rng, lang).sample(rng, lang)


SKILLS = {
    "choice": choice, "arithmetic": arithmetic, "facts": fact, "copying": copying, "summaries": summary,
    "identity": identity,
}  # fmt: skip
WEIGHTS = {"choice": 30, "arithmetic": 20, "facts": 18, "copying": 10, "summaries": 14, "identity": 8}


# ---- tools ----------------------------------------------------------------------------------------------------------


def tool(name: str, description: str, /, **properties: str) -> dict[str, Any]:
    """A function in OpenAI's form; every property is required."""
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "get_weather": tool("get_weather", "Weather in a city", city="string"),
    "get_time": tool("get_time", "Time in a city", city="string"),
    "set_alarm": tool("set_alarm", "Set an alarm", hour="integer"),
    "play_music": tool("play_music", "Play music for a person", name="string"),
}
ASK_TOOL = {
    "get_weather": ("How is the weather in {city}?", "{city}天气怎么样？"),
    "get_time": ("What time is it in {city}?", "{city}现在几点？"),
    "set_alarm": ("Set an alarm for {hour} o'clock.", "请设一个{hour}点的闹钟。"),
    "play_music": ("Play music for {name}.", "请给{name}放音乐。"),
}
TOOL_RESULT = {
    "get_weather": ('{{"weather": "{weather}"}}', ("It is {weather} in {city}.", "{city}的天气是{weather}。")),
    "get_time": ('{{"hour": {now}}}', ("It is {now} o'clock in {city}.", "{city}现在是{now}点。")),
    "set_alarm": ('{{"ok": true}}', ("The alarm is set for {hour} o'clock.", "{hour}点的闹钟设好了。")),
    "play_music": ('{{"ok": true}}', ("The music plays for {name}.", "正在给{name}放音乐。")),
}


def tool_call(rng: random.Random, lang: int) -> tuple[str, dict[str, Any]]:
    """A conversation in which one of one to three offered tools is called; half of them go on to the answer."""
    offered = rng.sample(sorted(TOOLS), rng.randint(1, 3))
    name = rng.choice(offered)
    capitals = next(r for r in RELATIONS if r.name == "capital").pairs
    values = {
        "city": rng.choice(capitals)[1][lang], "hour": rng.randint(1, 12), "now": rng.randint(1, 12),
        "name": rng.choice(NAMES[lang]), "weather": rng.choice(WEATHER)[lang],
    }  # fmt: skip
    arguments = {key: values[key] for key in TOOLS[name]["function"]["parameters"]["required"]}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages: Messages = [
        {"role": "user", "content": ASK_TOOL[name][lang].format(**values)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    if rng.random() < 0.5:
        result, answer = TOOL_RESULT[name]
        messages.append({"role": "tool", "content": result.format(**values)})
        messages.append({"role": "assistant", "content": answer[lang].format(**values)})
    key = f"{name}/{sorted(offered)}/{sorted(arguments.values())}"
    return key, {"skill": "tools", "messages": messages, "tools": [TOOLS[t] for t in offered]}


# ---- conversations and files ----------------------------------------------------------------------------------------


def exchange(sample: Sample) -> Messages:
    """A question and its answer."""
    return [{"role": "user", "content": sample.question}, {"role": "assistant", "content": sample.answer}]


def system(rng: random.Random, lang: int) -> Messages:
    """A system message for three conversations in ten."""
    return [{"role": "system", "content": rng.choice(SYSTEMS[lang])}] if rng.random() < 0.3 else []


def draw(rng: random.Random, lang: int, skill: str = "", held_out: bool = False) -> Sample:
    """One sample, of the skill or of any, from the training side or from what is held out."""
    while True:
        name = skill or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        sample = SKILLS[name](rng, lang)
        if is_held_out(sample) == held_out:
            return sample


def conversation(rng: random.Random) -> dict[str, Any]:
    """A training row: one exchange mostly, sometimes two to four, sometimes with tools."""
    lang = rng.choice((EN, ZH))
    if rng.random() < 0.08:
        while True:
            key, row = tool_call(rng, lang)
            if not is_held_out(Sample("tools", key, "", "")):
                return {"messages": system(rng, lang) + row["messages"], "tools": row["tools"]}
    turns = rng.choices((1, 2, 3, 4), (80, 10, 6, 4))[0]
    samples = [draw(rng, lang) for _ in range(turns)]
    return {"messages": system(rng, lang) + [message for sample in samples for message in exchange(sample)]}


def passage(rng: random.Random) -> dict[str, str]:
    """A training text: facts as sentences, sums, or a story with its summary."""
    lang, kind, gap = rng.choice((EN, ZH)), rng.random(), " "
    if kind < 0.2:
        return {"text": " ".join(event(rng, lang))}
    if kind < 0.5:
        samples, gap = [draw(rng, lang, "arithmetic") for _ in range(rng.randint(2, 6))], "\n"
    else:
        samples = [draw(rng, lang, "facts") for _ in range(rng.randint(2, 5))]
    return {"text": gap.join(sample.answer for sample in samples)}


def word_list(rng: random.Random) -> dict[str, str]:
    """Two to eight words, three to six times."""
    lang = rng.choice((EN, ZH))
    words = things(rng, lang, rng.randint(2, 8))
    return {"text": (" " if lang == EN else "、").join(words * rng.randint(3, 6))}


def corpus(rng: random.Random, rows: int) -> Iterator[dict[str, Any]]:
    """What the world has to say: seven conversations in ten, the rest texts and some lists."""
    kinds = (conversation, passage, word_list)
    for _ in range(rows):
        yield rng.choices(kinds, (74, 20, 6))[0](rng)


def drill(rng: random.Random, rows: int) -> Iterator[dict[str, Any]]:
    """What takes the most practice: sums, and lists to repeat."""
    for _ in range(rows):
        skill = rng.choice(("arithmetic", "arithmetic", "copying"))
        yield {"messages": exchange(draw(rng, rng.choice((EN, ZH)), skill))}


def questions(rng: random.Random, per_skill: int) -> Iterator[dict[str, Any]]:
    """Held-out rows of every skill, without repeats where there are enough; the last message is what is expected."""
    for skill in (name for name in SKILLS if name != "identity"):  # which has too few wordings to keep any
        seen: dict[str, Sample] = {}
        for _ in range(per_skill * 20):
            sample = draw(rng, rng.choice((EN, ZH)), skill, held_out=True)
            seen.setdefault(sample.question, sample)
            if len(seen) == per_skill:
                break
        yield from ({"skill": skill, "messages": exchange(sample)} for sample in seen.values())
    drawn = (tool_call(rng, rng.choice((EN, ZH))) for _ in range(per_skill * 40))
    kept = [row for key, row in drawn if is_held_out(Sample("tools", key, "", ""))]
    yield from kept[:per_skill]


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Rows as json lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("--rows", type=int, default=160_000, help="rows of world.jsonl; others in proportion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    write(args.out / "lists.jsonl", (word_list(rng) for _ in range(args.rows // 12)))
    write(args.out / "world.jsonl", corpus(rng, args.rows))
    write(args.out / "chat.jsonl", (conversation(rng) for _ in range(args.rows // 8)))
    write(args.out / "held_out.jsonl", questions(rng, 100))
    write(args.out / "drill.jsonl", drill(rng, args.rows // 8))


if __name__ == "__main__":
    main()
