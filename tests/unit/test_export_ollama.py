"""Go templates derived from Jinja: equal for every probe dialogue, or refused with the dialogue that differs."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import gotemplate, ollama
from export.ollama import Message, Render
from suite.errors import SuiteError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are \"Q\".<|im_end|>\n' }}{% endif %}" + CHATML
)
FIRST_SYSTEM_ONLY = (
    "{% if messages[0].role == 'system' %}{{ '<s>' + messages[0].content + '</s>' }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
EMPTY_SYSTEM_IS_DEFAULT = (
    "{{ messages[0].content if messages[0].role == 'system' and messages[0].content else 'Default.' }}\n"
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}"
    "{% elif not loop.first %}{{ 'later: ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content + '</' + m.role + '>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ODD_MARKS = (
    "{{ '\\u200b{{' }}{% for m in messages %}{{ '\"\"\"{' + m.role + '}}{' + m.content + '\"\"\"' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{' }}{% endif %}"
)


def renderer(template: str) -> Render:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)

    def refuse(text: str) -> None:
        raise SuiteError(text)

    def render(messages: Sequence[Message], generate: bool) -> str:
        return compiled.render(messages=messages, add_generation_prompt=generate, raise_exception=refuse)

    return render


@pytest.mark.parametrize(
    "template", [CHATML, DEFAULT_SYSTEM, FIRST_SYSTEM_ONLY, EMPTY_SYSTEM_IS_DEFAULT, NO_SYSTEM, ODD_MARKS]
)
def test_a_derived_template_renders_every_dialogue_as_the_jinja_does(template: str) -> None:
    render = renderer(template)
    go = ollama.derive(render)
    compared = 0
    for messages in ollama.dialogues().values():
        try:
            expected = render(gotemplate.collate(messages)[1], True)
        except SuiteError:
            continue
        assert gotemplate.render(go, messages) == expected
        compared += 1
    assert compared >= 7
    assert '"""' not in go


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(min_size=1, max_size=20)),
        min_size=1,
        max_size=8,
    )
)
def test_chatml_is_right_for_any_dialogue(turns: list[tuple[str, str]]) -> None:
    render = renderer(DEFAULT_SYSTEM)
    messages = [{"role": role, "content": text} for role, text in turns]
    assert gotemplate.render(GO, messages) == render(gotemplate.collate(messages)[1], True)


GO = ollama.derive(renderer(DEFAULT_SYSTEM))


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (CHATML.replace("m.content", "m.content | trim"), "white space at the ends"),
        (CHATML.replace("m.content", "(m.content | replace('{', '('))"), "braces"),
        (CHATML.replace("{% for m in messages %}", "{% for m in messages %}{{ loop.index }}"), "question"),
        (CHATML.replace("m.content", "(m.content if loop.last else '')"), "0 times"),
        (CHATML.replace("m.content", "m.content + m.content"), "2 times"),
    ],
)
def test_a_template_that_go_cannot_match_is_refused_with_the_difference(template: str, named: str) -> None:
    with pytest.raises(SuiteError, match=named) as caught:
        ollama.derive(renderer(template))
    assert "jinja" in caught.value.hint
