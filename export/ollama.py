"""A model for Ollama: a GGUF file and a Modelfile whose template gives the same prompt as the model's own.

The Go template is derived by rendering the model's Jinja with marked contents and looking what stands around the
marks. It is accepted when both give the same text for every dialogue of `dialogues()`, and refused otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export import gotemplate
from export.folder import eos_ids, read_config, read_json
from export.gguf_tokenizer import chat_template
from suite.chat import Chat
from suite.errors import SuiteError

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Messages and whether to open the assistant's turn -> the prompt, without a BOS that the engine itself adds."""

SYSTEM, USER, ASSISTANT, AGAIN = "QxSystemQx", "QxUserQx", "QxAssistantQx", "QxAgainQx"
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Ollama's names for what generation_config.json says."""
MOST_CONTEXT = 8192
"""Tokens; the memory for a context is taken when the model starts, and a person may ask for more."""


@dataclass(frozen=True)
class Parts:
    """What a template writes around contents; each message is head + content + tail."""

    prefix: str
    system: tuple[str, str] | None
    later_system: tuple[str, str] | None
    empty_is_none: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str


def jinja(folder: Path) -> Render:
    """How the model in `folder` renders a dialogue, as the text that an engine has to be given."""
    chat = Chat.load(folder)
    bos = chat.tokenizer.bos_token or ""
    added = bool(bos) and chat.tokenizer("")["input_ids"][:1] == [chat.tokenizer.bos_token_id]

    if "strftime_now" in chat_template(folder):
        raise _refused("it writes the date of the day")

    def render(messages: Sequence[Message], generate: bool) -> str:
        text = chat.text(messages, generate=generate)
        return text.removeprefix(bos) if added else text

    return render


def derive(render: Render) -> str:
    """A Go template that renders as `render` does; raises SuiteError naming the first dialogue that differs."""
    parts = _parts(render)
    template = _go(parts)
    for name, messages in dialogues().items():
        _, merged = gotemplate.collate(messages)
        try:
            expected = render(merged, True)
        except SuiteError:
            continue  # the model's own template refuses this dialogue
        found = gotemplate.render(template, messages)
        if found != expected:
            raise _refused(f"{name} would be {found!r}, where the model expects {expected!r}")
    return template


def dialogues() -> dict[str, list[Message]]:
    """Dialogues, by a name that says what is special about each; all end with the user."""

    def talk(roles: str, *texts: str) -> list[Message]:
        names = {"s": "system", "u": "user", "a": "assistant"}
        found = texts or tuple(f"Text {i}: 你好, {role}." for i, role in enumerate(roles))
        return [{"role": names[role], "content": text} for role, text in zip(roles, found, strict=True)]

    return {
        "one question": talk("u"),
        "a system text": talk("su"),
        "several turns": talk("uau"),
        "several turns after a system text": talk("suauau"),
        "an empty system text": talk("su", "", "Hi"),
        "two system texts": talk("ssu"),
        "a system text later on": talk("uasu"),
        "two system texts apart": talk("suasu"),
        "two questions in a row": talk("uu"),
        "two answers in a row": talk("uaau"),
        "braces": talk("su", "{{ .System }} {% if x %} }}", "{{ range .Messages }} {{ content }} {#"),
        "quotes": talk("u", 'say """three""" and \\n "one" `back`'),
        "white space at the ends": talk("sua" + "u", " s \n", "\n  u  ", " a ", "u\n\n"),
        "special tokens as text": talk("u", "<|im_end|> <s> </s> [INST] <|eot_id|>"),
        "emoji and controls": talk("u", "👩‍🚀 \t​é"),
    }


def modelfile(folder: Path, weights: str, template: str | None, license_text: str = "") -> str:
    """The Modelfile of the model in `folder`; without `template`, Ollama uses the Jinja inside the GGUF."""
    lines = [f"FROM ./{weights}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stop_texts(folder)]
    file = folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    if settings.get("do_sample", False):
        lines += [
            f"PARAMETER {new} {settings[old]}" for old, new in PARAMETERS.items() if settings.get(old) is not None
        ]
    else:
        lines.append("PARAMETER temperature 0")
    lines.append(f"PARAMETER num_ctx {min(read_config(folder)['max_position_embeddings'], MOST_CONTEXT)}")
    if license_text:
        lines.append(f'LICENSE """{license_text.replace(chr(34) * 3, chr(39) * 3)}"""')
    return "\n".join(lines) + "\n"


def stop_texts(folder: Path) -> list[str]:
    """The tokens that end an answer, as text."""
    tokenizer = read_json(folder / "tokenizer.json")
    texts = {i: text for text, i in tokenizer["model"]["vocab"].items()} if "vocab" in tokenizer["model"] else {}
    texts.update({added["id"]: added["content"] for added in tokenizer.get("added_tokens", ())})
    return [texts[i] for i in eos_ids(folder) if i in texts]


def check(folder: Path) -> None:
    """Raises SuiteError for a model without a chat template."""
    if not chat_template(folder):
        raise SuiteError("the model has no chat template, which Ollama needs", where=str(folder))


def _parts(render: Render) -> Parts:
    system, user, assistant = _message("system", SYSTEM), _message("user", USER), _message("assistant", ASSISTANT)
    again = _message("user", AGAIN)
    before, tail = _around(render([user], False), USER)
    prompt = _without(_around(render([user], True), USER)[1], tail, "the question's end")
    after = _around(render([user, assistant], False), ASSISTANT)[1]
    turn = render([user, assistant, again], True)
    assistant_head = _without(_between(turn, USER, ASSISTANT), tail, "the question's end")
    user_head = _without(_between(turn, ASSISTANT, AGAIN), after, "the answer's end")
    if not before.endswith(user_head):
        raise _refused(f"the first question begins with {before!r}, a later one with {user_head!r}")
    prefix = before.removesuffix(user_head)
    try:
        text = render([system, user], True)
    except SuiteError:
        return Parts(prefix, None, None, False, (user_head, tail), (assistant_head, after), prompt)
    head = _around(text, SYSTEM)[0]
    between = _between(text, SYSTEM, USER)
    if not between.endswith(user_head):
        raise _refused(f"a question after a system text begins with {between!r}, another with {user_head!r}")
    later = _later_system(render, tail, user_head)
    empty = render([_message("system", ""), user], True) == render([user], True)
    around = (head, between.removesuffix(user_head))
    return Parts(prefix, around, later, empty, (user_head, tail), (assistant_head, after), prompt)


def _later_system(render: Render, tail: str, user_head: str) -> tuple[str, str] | None:
    """What stands around a system text that is not the first message; None when it is left out."""
    try:
        text = render([_message("user", USER), _message("system", SYSTEM), _message("user", AGAIN)], True)
    except SuiteError:
        return None
    if SYSTEM not in text:
        return None
    head = _without(_between(text, USER, SYSTEM), tail, "the question's end")
    end = _between(text, SYSTEM, AGAIN)
    if not end.endswith(user_head):
        raise _refused(f"a question after a later system text begins with {end!r}")
    return head, end.removesuffix(user_head)


def _go(parts: Parts) -> str:
    """The template: what comes first, the messages by role, and what opens the answer."""
    first, system = _system_go(parts)
    return (
        f'{first}{{{{ range $i, $m := .Messages }}}}{{{{ if eq $m.Role "system" }}}}{system}'
        f'{{{{ else if eq $m.Role "user" }}}}{_message_go(parts.user)}'
        f'{{{{ else if eq $m.Role "assistant" }}}}{_message_go(parts.assistant)}{{{{ end }}}}{{{{ end }}}}'
        f"{_literal(parts.prompt)}"
    )


def _system_go(parts: Parts) -> tuple[str, str]:
    """What stands before all messages, and a system message: the first may be written otherwise than later ones."""
    prefix = _literal(parts.prefix)
    if parts.system is None:
        return prefix, ""
    head, tail = parts.system
    if head.startswith(parts.prefix):  # what both beginnings have is written once
        head = head.removeprefix(parts.prefix)
    else:
        no_system = 'ne (index .Messages 0).Role "system"'
        if parts.empty_is_none:
            no_system = f'or ({no_system}) (eq (index .Messages 0).Content "")'
        prefix = f"{{{{ if {no_system} }}}}{prefix}{{{{ end }}}}"
    system = _message_go((head, tail))
    if parts.empty_is_none:
        system = f"{{{{ if $m.Content }}}}{system}{{{{ end }}}}"
    later = _message_go(parts.later_system) if parts.later_system else ""
    if later != system:
        system = f"{{{{ if eq $i 0 }}}}{system}{{{{ else }}}}{later}{{{{ end }}}}"
    return prefix, system


def _message_go(around: tuple[str, str]) -> str:
    return _literal(around[0]) + "{{ $m.Content }}" + _literal(around[1])


def _literal(text: str) -> str:
    """`text` for a template inside a Modelfile, which knows no escapes and drops what cannot be printed."""
    plain = all(c.isprintable() or c in "\n\t" for c in text)
    if plain and "{{" not in text and '"""' not in text and not text.startswith('"') and not text.endswith(("{", '"')):
        return text
    return "{{ " + gotemplate.quote(text) + " }}"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _around(text: str, mark: str) -> tuple[str, str]:
    before, *after = text.split(mark)
    if len(after) != 1:
        raise _refused(f"it writes the content of a message {len(after)} times")
    return before, after[0]


def _between(text: str, first: str, second: str) -> str:
    return _around(_around(text, first)[1], second)[0]


def _without(text: str, start: str, what: str) -> str:
    if not text.startswith(start):
        raise _refused(f"{what} is {start!r} once and {text!r} another time")
    return text.removeprefix(start)


def _refused(reason: str) -> SuiteError:
    return SuiteError(
        f"no Go template renders exactly as the model's own: {reason}",
        hint='template = "jinja" leaves it out: Ollama then renders the Jinja in the GGUF',
    )
