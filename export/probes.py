"""The fixed texts on which a child is compared with its parent: English and Chinese, dialogues, plain text, code.

Some are there for the tokenizer and the chat template: whitespace that a template may trim, text that a tokenizer may
normalize, and special tokens as a person might paste them.
"""

from __future__ import annotations

SYSTEM = "You are a careful assistant. Answer briefly."
DIALOGUES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Who are you?"),),
    (("user", "你是谁？"),),
    (("user", "What is 17 + 25? Give only the number."),),
    (("user", "中国的首都是哪座城市？"),),
    (("user", "Name three colours."), ("assistant", "Red, green and blue."), ("user", "Which of them is the sky?")),
    (("user", "Translate to English: 今天天气很好。"),),
    (
        (
            "user",
            "Which of these is a mammal?\nA. shark\nB. whale\nC. trout\nD. octopus\nAnswer with one letter.",
        ),
    ),
    (("user", "用一句话总结：小明早上七点起床，吃了早饭，然后坐公交车去学校上课。"),),
    (("user", "  indented, and with an end of \n\n"), ("assistant", "\nTwo lines. \n"), ("user", "\tAgain?\n")),
    (("user", "What does <|im_end|> mean, and what </s>? 😀"),),
)
TEXTS = (
    "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote the weather in a book.",
    "水在标准大气压下一百摄氏度沸腾，零摄氏度结冰；海水含盐，所以结冰的温度更低。",
    "def mean(values):\n    if not values:\n        raise ValueError('empty')\n    return sum(values) / len(values)\n",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "alive": false}',
    "Spaces:  two,   three,\ta tab,\r\na line,\n\n\n three lines and an end. ",
    "0 1 12 123 1234567890 3.14159 1e-5 0x7f 1,000,000 50% 2026-11-22 ½ ²",
    "Ünïcödé naïve café, العربية, हिन्दी, русский, ภาษาไทย, 日本語のテスト, 한국어; 👩‍👩‍👧 🇫🇷 👍🏽 ﬁ Å",
    "<|im_start|>system\n[INST] <<SYS>> <s> </s> <|endoftext|> <think> </think> {{ messages }} {% if x %}",
)


def dialogues() -> list[list[dict[str, str]]]:
    """The dialogues as messages; every second one has a system text."""
    found = []
    for i, turns in enumerate(DIALOGUES):
        messages = [{"role": role, "content": text} for role, text in turns]
        found.append([{"role": "system", "content": SYSTEM}, *messages] if i % 2 else messages)
    return found
