"""Texts on which tokenizers that should be the same come apart: each is tokenized by both before a GGUF is believed."""

from __future__ import annotations

TEXTS = (
    "",
    " ",
    "  ",
    "     leading, trailing      ",
    "\n",
    "\n\n\n a\n \n\n\tb\r\n\r\nc\n",
    "\t\t \t\n  \t x",
    "\u00a0no-break\u3000ideographic\u2003em\u200bzero\ufeffwidth\u2028line",
    "Hello world! HELLO WORLD? hello, world... (hello) [world] {hello}",
    "I'm, you're, he'll, we've, SHE'D, they'RE, o'clock, rock'n'roll, 's 't 'LL",
    "0 1 12 123 1234 12345 123456789 3.14159 1,000,000 1e-5 0x1F 2026-11-22 12:34:56 ½ ² Ⅷ ٣٤ ३४ 一二三",
    "你好，世界！今天天气很好。「引号」《书名》——省略……",
    "こんにちは世界、カタカナとﾊﾝｶｸ。 안녕하세요 세계! Xin chào thế giới",
    "🚀 ✅ 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇫🇷 😶\u200d🌫️ ❤️ 1️⃣",
    "Ünïcödé ÀÉÎ straße ŁÓDŹ Ελληνικά Кириллица ЁЖ ǅ ﬁ İı",
    "مرحبا بالعالم ١٢٣ שלום עולם \u202eright to left\u202c",
    "नमस्ते दुनिया ไทยไม่มีวรรค தமிழ் ខ្មែរ ကမ္ဘာ",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 Z\u0351\u036b\u0343a\u0329l\u0348g\u0336o",
    "\x00\x01\x07\x08\x0b\x0c\x1b[31m\x7f\x85\u009f",
    'def f(x: int) -> str:\n    """Doc."""\n\treturn f\'{x!r:>10}\'  # why?\n\n\nprint(f(1))\n',
    '<div class="a">&amp;</div> SELECT * FROM t WHERE a<>b; $x += 1; a->b::c ~= !@#$%^&*()_+-=|\\`',
    '{"key": [1, 2.5, true, null], "nested": {"a": "b\\n"}}',
    "https://example.org/a/b?c=d&e=f#g user@example.org C:\\Windows\\System32 /usr/local/bin",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "𝒜𝓁𝓅𝒽𝒶 𠀀𠀁 \U0001f9ff \U000e0041 \ufffd \ue000",
    "Antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "CamelCaseWords snake_case_words kebab-case-words SCREAMING_CASE x1y2z3",
    "#hashtag @mention 50% $100 €20 £30 ¥40 №5 ©®™ °C ±≠≤≥∞ →⇒ αβγ",
)


def texts(tokens: list[str]) -> list[str]:
    """The fixed texts, and some with the special `tokens` of a tokenizer in them: alone, glued to words, in a row."""
    found = list(TEXTS)
    for token in tokens:
        found += [token, f"a{token}b", f" {token} \n", f"{token}{token}x", token[:-1], token.upper()]
    return found
