"""Invariant: the prompt in training, in serving and in Ollama is one text, for many real templates."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from export import gotemplate, ollama
from suite.chat import Chat
from suite.errors import SuiteError
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

TEMPLATES = Path(__file__).parents[3] / "shared" / "chat-templates"
EXACT_IN_GO = 4
"""At least so many of the templates there have an equal Go template; the others are refused with the reason."""

DIALOGUES = [
    [("user", "Hi there"), ("assistant", "Hello friend")],
    [("system", "Be nice"), ("user", "Hi"), ("assistant", "Hello")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    [("system", "s"), ("user", "你好 {{ x }}"), ("assistant", "b"), ("user", " two\n lines "), ("assistant", "d")],
]


def chat_of(template: str) -> Chat:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    tokenizer.bos_token = "<s>"
    return Chat(tokenizer)


def checked(template: str) -> tuple[int, bool]:
    """How many dialogues are one text in training and serving, and whether a Go template gives it too."""
    chat = chat_of(template)
    equal = 0
    for dialogue in DIALOGUES:
        messages = [{"role": role, "content": text} for role, text in dialogue]
        try:
            ids, mask = chat.learnt(messages)
            served = chat.ids(messages[:-1], generate=True)
        except SuiteError:
            continue  # the template refuses the dialogue, or cannot be split, and says so
        learnt = max(i for i, m in enumerate(mask) if m and not mask[i - 1])
        # what a template writes for every answer before its content, e.g. an empty thinking block, may be learnt
        assert ids[:learnt][: len(served)] == served[: len(ids[:learnt])]
        equal += 1
    try:
        go = ollama.derive(lambda messages, generate: chat.text(messages, generate=generate))
    except SuiteError:
        return equal, False
    for dialogue in DIALOGUES:
        messages = [{"role": role, "content": text} for role, text in dialogue[:-1]]
        try:
            expected = chat.text(messages, generate=True)
        except SuiteError:
            continue
        assert gotemplate.render(go, messages) == expected
    return equal, True


def test_the_templates_of_the_tests() -> None:
    assert checked(CHAT_TEMPLATE) == (len(DIALOGUES), True)


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="the real templates are not beside this checkout")
def test_real_templates() -> None:
    found = {file.stem: checked(file.read_text("utf-8")) for file in sorted(TEMPLATES.glob("*.jinja"))}
    print(found)
    assert sum(equal > 0 for equal, _ in found.values()) >= len(found) // 2
    assert sum(go for _, go in found.values()) >= EXACT_IN_GO
