"""How a model writes what is more than plain text, reasoning and calls of tools: read off its own chat template.

Conversations with stand-ins are rendered; what the template puts around them is the form the model was trained on:

    <think>REASONING</think>ANSWER        <tool_call>{"name": "NAME", "arguments": {"KEY": "VALUE"}}</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.calls import MARK, Calls
from serve.json_calls import HERMES, CallForm, CallParser
from serve.marked_calls import PROBE, MarkedCalls, MarkedForm, Spelling, read_off
from suite.chat import Chat, Message, Tool, common_prefix
from suite.errors import SuiteError

_QUESTION: Message = {"role": "user", "content": "probe question"}
_NAMES = ("probe_one", "probe_two")
_IDS = ("probe0001", "probe0002")  # Mistral's templates want nine letters or digits
_TOOLS: list[Tool] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "probe",
            "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "probe"}}},
        },
    }
    for name in _NAMES
]

_KEY = {"probe_key": "probe value"}
_ARGUMENTS = re.compile(r'\{\s*"probe_key":\s*"probe value"\s*\}')
_ID = re.compile(r'(, "id": "|\[CALL_ID\])probe000\d"?')
_THINKING = re.compile(r"<(/)(think[^<>'\"\s]*)>|\[(/)(THINK)\]")


@dataclass(frozen=True)
class Dialect:
    """What one chat template writes: the marks around reasoning, and the form of calls; None where it has none."""

    reasoning: tuple[str, str] | None
    calls: CallForm | MarkedForm | None
    takes_tools: bool
    """Whether the tools of a request reach the prompt at all."""

    @classmethod
    def of(cls, chat: Chat) -> Dialect:
        """Read it off `chat`'s template."""
        reasoning = _reasoning(chat)
        plain, prompt = _rendered(chat, [_QUESTION], tools=False), _rendered(chat, [_QUESTION])
        calls = _call_form(chat, prompt, reasoning) or _marked_form(chat, prompt, reasoning)
        return cls(reasoning, calls, plain != prompt)

    def held(self, *, must: bool) -> CallForm | Spelling | None:
        """The form to which calls can be held; where some `must` be made, one of ours if the template shows none."""
        found = self.calls.spelling if isinstance(self.calls, MarkedForm) else self.calls
        return found or (HERMES if must else None)

    def parser(self, tools: Sequence[Tool], *, must: bool) -> Calls | None:
        """What finds calls of `tools` in one answer; None where there can be none.

        Where some `must` be made, the answer is `held` to a form.
        """
        functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        if not functions:
            return None
        if isinstance(self.calls, MarkedForm) and (self.calls.spelling or not must):
            return MarkedCalls(self.calls, {n: f.get("parameters") or {} for n, f in functions.items()})
        form = self.calls if isinstance(self.calls, CallForm) else HERMES if must else None
        return CallParser(form, functions) if form else None

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, of reasoning and of calls."""
        return (*(self.reasoning or ()), *(self.calls.marks if self.calls else ()))


def _reasoning(chat: Chat) -> tuple[str, str] | None:
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "probe thought")
    text = _rendered(chat, [_QUESTION, {"role": "assistant", "content": "probe answer", **thought}], tools=False)
    before, found, after = text.partition("probe thought")
    if found and "probe answer" in after:
        opening = [mark for mark in MARK.findall(before) if before.rstrip().endswith(mark)][-1:]
        closing = MARK.match(after.lstrip())
        # a mark that stands elsewhere too does not tell where reasoning ends
        if opening and closing and text.count(opening[0]) == text.count(closing[0]) == 1:
            return opening[0], closing[0]
    # many templates drop the reasoning of past turns, and show the mark only where they look for it
    template = chat.tokenizer.get_chat_template(None, None)
    if shown := _THINKING.search(template):
        return shown[0].replace("/", "", 1), shown[0]
    return None


def _call_form(chat: Chat, prompt: str, reasoning: tuple[str, str] | None) -> CallForm | None:
    one, two = _turn(chat, prompt, 1, _KEY), _turn(chat, prompt, 2, _KEY)
    places = [match.span() for match in _ARGUMENTS.finditer(one)]
    if len(places) != 1 or one.count(_NAMES[0]) != 1 or one.index(_NAMES[0]) > places[0][0]:
        return None
    (start, end), name = places[0], one.index(_NAMES[0])
    first = _without(one[:name], reasoning)
    between = None
    seconds = [match.end() for match in _ARGUMENTS.finditer(two)]
    if len(seconds) == 2 and _NAMES[1] in two[seconds[0] :]:
        between = two[seconds[0] : two.index(_NAMES[1], seconds[0])]
    last = one[end:].removesuffix("\n")
    for stop in chat.stop_texts:
        last = last.partition(stop)[0]
    form = CallForm(first, one[name + len(_NAMES[0]) : start], between, last)
    # without marks or an object nothing tells a name from other text
    return form if form.in_object or MARK.search(form.opening) else None


def _marked_form(chat: Chat, prompt: str, reasoning: tuple[str, str] | None) -> MarkedForm | None:
    one, two = (_without(_turn(chat, prompt, calls, PROBE), reasoning) for calls in (1, 2))
    form = read_off(one, two, chat.stop_texts)
    if form is None:
        return None
    told = MarkedCalls(form, {}).feed(two, final=True)
    arguments = "".join(part.text for part in told if part.kind == "arguments")
    # a form that does not read what it was read off is none
    return form if arguments == 2 * json.dumps(PROBE) else None


def _without(turn: str, reasoning: tuple[str, str] | None) -> str:
    """A turn's text after its empty reasoning."""
    turn = turn.lstrip()
    for mark in reasoning or ():
        turn = turn.removeprefix(mark).lstrip()
    return turn


def _turn(chat: Chat, prompt: str, calls: int, arguments: Mapping[str, Any]) -> str:
    """What an assistant with that many calls says after `prompt`; "" when the template refuses it."""
    made = [
        {"type": "function", "id": number, "function": {"name": name, "arguments": arguments}}
        for number, name in [*zip(_IDS, _NAMES, strict=True)][:calls]
    ]
    text = _rendered(chat, [_QUESTION, {"role": "assistant", "content": "", "tool_calls": made}])
    shared = common_prefix(prompt, text)
    # where they part inside a mark, the turn has the whole of it
    opened = text.rfind("<", 0, shared)
    return _ID.sub("", text[opened if opened > text.rfind(">", 0, shared) else shared :])


def _rendered(chat: Chat, messages: list[Message], tools: bool = True) -> str:
    try:
        return chat.text(messages, _TOOLS if tools else None, generate=messages[-1]["role"] == "user")
    except SuiteError:
        return ""
