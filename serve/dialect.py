"""How a model writes what is more than plain text, reasoning and calls of tools: read off its own chat template.

Conversations with stand-ins are rendered; what the template puts around them is the form the model was trained on:

    <think>REASONING</think>ANSWER        <tool_call>{"name": "NAME", "arguments": {"KEY": "VALUE"}}</tool_call>
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from suite.chat import Chat, Message, Tool, common_prefix, common_suffix
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

_MARK = re.compile(r"<[^<>\s][^<>]*>|\[/?[A-Z_]+\]")
_OBJECT = re.compile(r'(\[?)\s*\{[^{}]*"\w*name":\s*"$')
_ARGUMENTS = re.compile(r'\{\s*"probe_key":\s*"probe value"\s*\}')
_ID = re.compile(r'(, "id": "|\[CALL_ID\])probe000\d"?')
_THINKING = re.compile(r"<(/)(think[^<>'\"\s]*)>|\[(/)(THINK)\]")


@dataclass(frozen=True)
class CallForm:
    """What a template writes around the names and JSON arguments of calls.

    first NAME middle ARGUMENTS between NAME middle ARGUMENTS last; `between` is None where a turn has one call only.
    """

    first: str
    middle: str
    between: str | None
    last: str

    @property
    def in_object(self) -> bool:
        """Whether name and arguments are members of one JSON object."""
        return bool(_OBJECT.search(self.first))

    @property
    def in_list(self) -> bool:
        """Whether calls are the elements of one JSON list."""
        found = _OBJECT.search(self.first)
        return bool(found and found[1])

    @property
    def section(self) -> str:
        """The mark that stands once before all calls, "" where each has only its own."""
        return "" if self.in_object else self.first.removesuffix(self.opening).strip()

    @property
    def opening(self) -> str:
        """The mark before each call, or before their list; "" where nothing marks calls."""
        if self.in_object:
            return _OBJECT.sub("", self.first).strip()
        return common_suffix(self.first, self.between or self.first).lstrip("> \n")

    @property
    def closings(self) -> tuple[str, ...]:
        """The marks that may follow a call."""
        after = (self.between or "").removesuffix(self.opening) + self.last
        found = [*_MARK.findall(after), *re.findall("```", after)]
        return tuple(dict.fromkeys(mark for mark in found if mark not in self.first))

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks of the form."""
        return tuple(_MARK.findall(" ".join((self.first, self.middle, self.between or "", self.last))))


HERMES = CallForm(
    '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>"
)
"""What a model is made to write where calls are required and its template shows no form of its own."""


@dataclass(frozen=True)
class Dialect:
    """What one chat template writes: the marks around reasoning, and the form of calls; None where it has none."""

    reasoning: tuple[str, str] | None
    calls: CallForm | None
    takes_tools: bool
    """Whether the tools of a request reach the prompt at all."""

    @classmethod
    def of(cls, chat: Chat) -> Dialect:
        """Read it off `chat`'s template."""
        reasoning = _reasoning(chat)
        plain, prompt = _rendered(chat, [_QUESTION], tools=False), _rendered(chat, [_QUESTION])
        return cls(reasoning, _call_form(chat, prompt, reasoning), plain != prompt)

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, of reasoning and of calls."""
        return (*(self.reasoning or ()), *(self.calls.marks if self.calls else ()))


def _reasoning(chat: Chat) -> tuple[str, str] | None:
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "probe thought")
    text = _rendered(chat, [_QUESTION, {"role": "assistant", "content": "probe answer", **thought}], tools=False)
    before, found, after = text.partition("probe thought")
    if found and "probe answer" in after:
        opening = [mark for mark in _MARK.findall(before) if before.rstrip().endswith(mark)][-1:]
        closing = _MARK.match(after.lstrip())
        # a mark that stands elsewhere too does not tell where reasoning ends
        if opening and closing and text.count(opening[0]) == text.count(closing[0]) == 1:
            return opening[0], closing[0]
    # many templates drop the reasoning of past turns, and show the mark only where they look for it
    template = chat.tokenizer.get_chat_template(None, None)
    if shown := _THINKING.search(template):
        return shown[0].replace("/", "", 1), shown[0]
    return None


def _call_form(chat: Chat, prompt: str, reasoning: tuple[str, str] | None) -> CallForm | None:
    one, two = _turn(chat, prompt, 1), _turn(chat, prompt, 2)
    places = [match.span() for match in _ARGUMENTS.finditer(one)]
    if len(places) != 1 or one.count(_NAMES[0]) != 1 or one.index(_NAMES[0]) > places[0][0]:
        return None
    (start, end), name = places[0], one.index(_NAMES[0])
    first = one[:name].lstrip()
    for mark in reasoning or ():
        first = first.removeprefix(mark).lstrip()
    between = None
    seconds = [match.end() for match in _ARGUMENTS.finditer(two)]
    if len(seconds) == 2 and _NAMES[1] in two[seconds[0] :]:
        between = two[seconds[0] : two.index(_NAMES[1], seconds[0])]
    last = one[end:].removesuffix("\n")
    for stop in chat.stop_texts:
        last = last.partition(stop)[0]
    form = CallForm(first, one[name + len(_NAMES[0]) : start], between, last)
    # without marks or an object nothing tells a name from other text
    return form if form.in_object or _MARK.search(form.opening) else None


def _turn(chat: Chat, prompt: str, calls: int) -> str:
    """What an assistant with that many calls says after `prompt`; "" when the template refuses it."""
    made = [
        {"type": "function", "id": number, "function": {"name": name, "arguments": {"probe_key": "probe value"}}}
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
