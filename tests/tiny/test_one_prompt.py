"""Invariant: the prompt in training, in serving and in Ollama is one text, for many real templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import ollama
from export.ollama.dialogues import go_prompt, probes, settled
from suite.chat import Chat
from suite.errors import SuiteError
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

TEMPLATES = Path(__file__).parents[3] / "shared" / "chat-templates"
NANO = Path(__file__).parents[2] / "examples" / "nano"
EQUAL_IN_GO = {"plain": 30, "tools": 18, "thinking": 30}
"""For at least so many of the real templates a Go template is equal on all dialogues of that kind (of 35)."""

DIALOGUES = [
    [("user", "Hi there"), ("assistant", "Hello friend")],
    [("system", "Be nice"), ("user", "Hi"), ("assistant", "Hello")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    [("system", "s"), ("user", "你好 {{ x }}"), ("assistant", "b"), ("user", " two\n lines "), ("assistant", "d")],
]


def chat_of(template: str) -> Chat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = "<s>"
    return Chat(tokenizer)


def checked(template: str) -> int:
    """How many dialogues are one text in training and serving."""
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
    return equal


def equal_kinds(template: str) -> tuple[set[str], str]:
    """For which kinds of dialogues a Go template is equal, all that the Jinja renders; and what differs, or why none is."""
    try:
        found = ollama.go_template(ollama.reference_of(chat_of(template)), "warn")
    except SuiteError as error:
        return set(), error.message
    different = {name.split(":")[0] for name in found.differs}
    return {kind for kind, n in found.equal.items() if n and kind not in different}, "; ".join(found.differs)


def test_the_templates_of_the_tests() -> None:
    assert checked(CHAT_TEMPLATE) == len(DIALOGUES)
    assert equal_kinds(CHAT_TEMPLATE) == ({"plain", "tools", "thinking"}, "")


def test_ids_in_ollama_are_the_ids_in_serving() -> None:
    """The Go template's text, tokenised as llama.cpp does, gives the ids that the chat gives."""
    for chat in (Chat.load(NANO / "model"), chat_of(CHAT_TEMPLATE)):
        template = ollama.go_template(ollama.reference_of(chat)).text
        for dialogue in (each for kind in probes().values() for each in kind.values()):
            seen = settled(dialogue)
            served = chat.ids([*map(ollama.as_jinja, seen.messages)], seen.tools, generate=True)
            assert chat.tokenizer(go_prompt(template, dialogue), add_special_tokens=False)["input_ids"] == served


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="the real templates are not beside this checkout")
def test_real_templates() -> None:
    found = {file.stem: checked(file.read_text("utf-8")) for file in sorted(TEMPLATES.glob("*.jinja"))}
    assert sum(equal > 0 for equal in found.values()) >= len(found) // 2


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="the real templates are not beside this checkout")
def test_real_templates_in_go() -> None:
    found = {file.stem: equal_kinds(file.read_text("utf-8")) for file in sorted(TEMPLATES.glob("*.jinja"))}
    for name, (kinds, reason) in found.items():
        print(f"{name:45} {' '.join(sorted(kinds)):22} {reason[:120]}")
    counts = {kind: sum(kind in kinds for kinds, _ in found.values()) for kind in EQUAL_IN_GO}
    assert all(counts[kind] >= least for kind, least in EQUAL_IN_GO.items()), counts
