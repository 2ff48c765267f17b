"""Small chat templates of many shapes, and how they render: as transformers does, without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import jinja2

from export.ollama.dialogues import Dialogue, Reference
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
LAST_SYSTEM_FIRST = (
    "{% set ns = namespace(s='') %}{% for m in messages if m.role == 'system' %}{% set ns.s = m.content %}{% endfor %}"
    "{{ ns.s }}{% for m in messages if m.role != 'system' %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
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
TRIMMED_AND_DATED = (
    "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}"
    "{{ '[' + m.role + ']' + (m.content.lstrip('\n') if m.role == 'system' else m.content | trim) + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% else %}{{ eos_token }}{% endif %}"
)
SYSTEM_IN_LAST_QUESTION = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content }}"
    "[/INST]{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
PLAIN = [
    CHATML,
    DEFAULT_SYSTEM,
    FIRST_SYSTEM_ONLY,
    EMPTY_SYSTEM_IS_DEFAULT,
    LAST_SYSTEM_FIRST,
    NO_SYSTEM,
    ODD_MARKS,
    TRIMMED_AND_DATED,
    SYSTEM_IN_LAST_QUESTION,
]
CALLS = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- set thinking = m.reasoning_content or '' %}
        {%- if loop.index0 > ns.last and (thinking or loop.last) %}
            {{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + m.content.lstrip('\\n') }}
        {%- else %}{{- m.content }}{%- endif %}
        {%- for c in m.tool_calls or [] %}
            {%- if not loop.first or m.content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif m.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{%- if tools %}{{- '<|im_start|>system\n' + s + '# Tools\n<tools>' }}{%- for t in tools %}{{- '\n' + t | tojson }}"
    "{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}" + CALLS
)
"""Shaped like Qwen3's: the thinking of earlier answers is dropped, calls after the last question keep theirs."""
LISTED = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}{{ '[INST]' + m.content }}[/INST]"
    '{% elif m.tool_calls %}[CALLS][{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] + \', "id": "\' + c.id }}"}'
    "{{ ', ' if not loop.last else ']</s>' }}{% endfor %}{% elif m.role == 'tool' %}"
    "{{ '[RESULT]' + m.content + ' of ' + m.tool_call_id + '[/RESULT]' }}{% else %}{{ m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
XML = (
    "{% if tools %}{% for t in tools %}{{ '* ' + t.function.name + ': ' + (t.function.description or '-') + '\n' }}"
    "{% endfor %}{% endif %}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<arg k=\"' + k + '\">' + (v if v is string else v | tojson) + '</arg>' }}{% endfor %}</call>{% endfor %}"
    "{{ '</' + m.role + '>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def refuse(text: str) -> None:
    raise SuiteError(text)


@cache
def reference(template: str) -> Reference:
    """Renders as transformers does, without it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template)

    def text(dialogue: Dialogue, generate: bool, date: Callable[[str], str]) -> str:
        names = {"thinking": "reasoning_content", "tool_name": "name"}
        more = {} if dialogue.think is None else {"enable_thinking": dialogue.think}
        return compiled.render(
            messages=[{names.get(k, k): v for k, v in m.items()} for m in dialogue.messages],
            tools=list(dialogue.tools) or None,
            add_generation_prompt=generate,
            raise_exception=refuse,
            strftime_now=date,
            eos_token="<eos>",
            **more,
        )

    return Reference(text, "<eos>")
