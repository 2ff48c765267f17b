"""What is learnt of a conversation: the assistant's turns with their end, and nothing else, for many templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.chat import Chat, load_tokenizer
from suite.errors import SuiteError
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

TEMPLATES = Path(__file__).parents[3] / "shared" / "chat-templates"
UNMARKED = re.sub(r"\{%-? (end)?generation %\}", "", CHAT_TEMPLATE)

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_time", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "get_time", "description": "d", "parameters": {"type": "object"}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be nice"}
ONE = [user("Hi there"), assistant("Hello friend")]
MULTI = [*ONE, user("Bye now"), assistant("See you"), user("Really?"), assistant("Yes indeed")]
TOOLS = [
    user("Time in Paris?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "12:00", "tool_call_id": "abcdefghi", "name": "get_time"},
    assistant("It is noon"),
    user("Thanks a lot"),
    assistant("Welcome"),
]


def chat_of(
    template: str, *, special: tuple[str, ...] = (), stops: tuple[str, ...] = (), eos: str = "<|im_end|>"
) -> Chat:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.bos_token, tokenizer.eos_token = "<s>", eos
    return Chat(tokenizer, [tokenizer.convert_tokens_to_ids(stop) for stop in stops])


def learnt(chat: Chat, messages: list[Any], tools: list[Any] | None = None, **kwargs: Any) -> list[str]:
    """The learnt parts, decoded; checks that the ids are those of the text."""
    ids, mask = chat.learnt(messages, tools, **kwargs)
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}
    text = chat.ids(messages, tools, **kwargs)
    assert ids[: len(text)] == text
    parts: list[list[int]] = []
    for before, now, token in zip([0, *mask], mask, ids, strict=False):
        if now:
            parts += [] if before else [[]]
            parts[-1].append(token)
    return [str(chat.tokenizer.decode(part)) for part in parts]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED], ids=["marks", "rendering"])
def test_all_assistant_turns_with_their_end_and_nothing_else(template: str) -> None:
    chat = chat_of(template)
    assert learnt(chat, ONE) == ["Hello friend<|im_end|>"]
    assert learnt(chat, [SYSTEM, *MULTI]) == ["Hello friend<|im_end|>", "See you<|im_end|>", "Yes indeed<|im_end|>"]
    call = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert learnt(chat, TOOLS, [TOOL]) == [call, "It is noon<|im_end|>", "Welcome<|im_end|>"]


contents = st.text(st.characters(codec="utf-8"), max_size=12).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_marks_and_rendering_agree_on_any_text(turns: list[tuple[str, str]]) -> None:
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    marked, rendered = chat_of(CHAT_TEMPLATE), chat_of(UNMARKED)
    assert marked.learnt(messages) == rendered.learnt(messages)
    assert learnt(rendered, messages) == [f"{answer}<|im_end|>" for _, answer in turns]
    for at in range(1, len(messages), 2):
        assert rendered.text(messages).startswith(rendered.text(messages[:at], generate=True))


def test_a_token_over_the_boundary_belongs_to_the_prompt() -> None:
    chat = chat_of(UNMARKED)
    chat.tokenizer.add_tokens(["\n\n"])
    assert learnt(chat, [user("Hi"), assistant("\nHello")]) == ["Hello<|im_end|>"]


def test_arguments_of_calls_may_be_text_as_clients_send_them() -> None:
    as_text = {**CALL, "function": {"name": "get_time", "arguments": '{"city": "Paris"}'}}
    chat = chat_of(CHAT_TEMPLATE)
    messages = [*TOOLS[:1], assistant("", tool_calls=[as_text]), *TOOLS[2:]]
    assert chat.text(messages, [TOOL]) == chat.text(TOOLS, [TOOL])
    pasting = chat_of(
        CHAT_TEMPLATE.replace("call.function.arguments} | tojson", "'#' + call.function.arguments} | tojson")
    )
    assert pasting.text(messages, [TOOL]) == pasting.text(TOOLS, [TOOL])
    assert r"#{\"city\": \"Paris\"}" in pasting.text(messages, [TOOL])


# drops the reasoning of turns before the last question, as Qwen3 does
REASONING = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('' if think else '') }}{% endif %}
"""


def test_a_template_that_drops_old_reasoning() -> None:
    chat = chat_of(REASONING)
    first = assistant("Hello friend", reasoning_content="greet")
    last = assistant("See you", reasoning_content="part")
    assert learnt(chat, [user("Hi there"), first]) == ["<think>\ngreet\n</think>\n\nHello friend<|im_end|>"]
    assert learnt(chat, [user("Hi there"), first, user("Bye now"), last]) == [
        "Hello friend<|im_end|>",
        "<think>\npart\n</think>\n\nSee you<|im_end|>",
    ]
    # the call's own prompt still shows no reasoning, the whole text does not either: later questions took it away
    assert learnt(chat, TOOLS) == [
        "<call>get_time<|im_end|>",
        "It is noon<|im_end|>",
        "<think>\n\n</think>\n\nWelcome<|im_end|>",
    ]


def test_a_turn_that_only_the_next_role_ends() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = chat_of(template, special=("<|user|>", "<|assistant|>"), stops=("<|user|>",))
    assert learnt(chat, MULTI) == ["Hello friend<|user|>", "See you<|user|>", "Yes indeed<|user|>"]


def test_nothing_after_a_stop_token_is_learnt() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    chat = chat_of(template, special=("<|user|>", "<|assistant|>", "<|end|>"), stops=("<|end|>",))
    assert learnt(chat, MULTI) == ["Hello friend<|end|>", "See you<|end|>", "Yes indeed<|end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
            "does not heed add_generation_prompt",
        ),
        (UNMARKED + "<think>\n", "does not heed add_generation_prompt|the server's prompt"),
        (
            UNMARKED.replace(
                "'<|im_start|>assistant\\n' }}\n{%- endif", "'<|im_start|>assistant\\n<think>' }}\n{%- endif"
            ),
            "<think>",
        ),
        (UNMARKED.replace("{{- message.content or '' }}", ""), "leaves out|renders nothing|once"),
        (
            CHAT_TEMPLATE.replace(
                "messages[0].role == 'system'", "messages[0].role == 'system' and add_generation_prompt"
            ),
            "prompt",
        ),
        ("{% for m in messages %}{{ raise_exception('no system here') }}{% endfor %}", "no system here"),
    ],
)
def test_a_template_that_cannot_be_split_says_why(template: str, reason: str) -> None:
    with pytest.raises(SuiteError, match=reason):
        chat_of(template).learnt([SYSTEM, *MULTI])


def test_a_template_without_tools_says_so() -> None:
    ignoring = chat_of("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(SuiteError, match="leaves out the tool 'get_time'"):
        ignoring.learnt(TOOLS, [TOOL])


def test_a_base_without_template_or_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(SuiteError, match=r"no chat template[\s\S]*instruction-tuned"):
        Chat(tokenizer)
    with pytest.raises(SuiteError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


# real templates: which must work, and which must say why they cannot (their prompt opens what the turn does not have)
WORK = "Qwen2.5 Qwen3-Coder Llama-3.2 MiMo granite Bielik Kimi-K2 LFM2.5 MiniCPM5 Devstral Small-3.2 GigaChat Reka DeepSeek-V4"
REFUSE = "GLM-4.7 R1-Distill MiniMax-M2 c4ai-command gemma-4"


def real_chat(file: Path) -> Chat:
    template = file.read_text("utf-8")
    shape = r"<[|｜][^<>\n{}'\"]{1,40}[|｜]>|</?s>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|<SPECIAL_\d+>|<sep>"
    special = tuple(sorted({*re.findall(shape, template), "<s>", "</s>"}))
    return chat_of(template, special=special, eos="</s>")


def real_templates() -> list[Any]:
    files = sorted(TEMPLATES.glob("*.jinja")) if TEMPLATES.is_dir() else []
    if not files:
        return [pytest.param(None, marks=pytest.mark.skip(reason="no shared/chat-templates beside the checkout"))]
    return [pytest.param(file, id=file.stem) for file in files]


@pytest.mark.parametrize("file", real_templates())
def test_a_real_template_is_split_exactly_or_refused(file: Path) -> None:
    chat = real_chat(file)
    works, refusals = 0, 0
    for messages, tools in (
        (ONE, None),
        ([SYSTEM, *ONE], None),
        (MULTI, None),
        ([SYSTEM, *MULTI], None),
        (TOOLS, [TOOL]),
    ):
        try:
            parts = learnt(chat, messages, tools)
        except SuiteError:
            refusals += 1
            continue
        works += 1
        answers = [message["content"] or "get_time" for message in messages if message["role"] == "assistant"]
        others = [message["content"] for message in messages if message["role"] != "assistant"]
        assert len(parts) == len(answers)
        for part, answer in zip(parts, answers, strict=True):
            assert answer in part
            assert not [other for other in others if other in part]
        assert chat.text(messages, tools).startswith(chat.text(messages[:-1], tools, generate=True))
    if any(name in file.name for name in WORK.split()):
        assert works >= 4
    if any(name in file.name for name in REFUSE.split()):
        assert refusals == 5


def test_a_conversation_without_an_answer_has_nothing_to_learn() -> None:
    ids, mask = chat_of(CHAT_TEMPLATE).learnt(ONE[:1])
    assert ids == chat_of(CHAT_TEMPLATE).ids(ONE[:1])
    assert not any(mask)
