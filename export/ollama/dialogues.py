"""Dialogues as Ollama's API takes them, what Go templates are given of them, and the probes that templates must pass.

Before a template sees a dialogue, Ollama joins neighbours of one role, sorts arguments and parameters by name, and
keeps of a tool's schema only what its own types have. Both renderings get the dialogue after that.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from export.ollama.gofunctions import Struct
from export.ollama.gotemplate import render

Message = dict[str, Any]
Tool = dict[str, Any]
Kind = Literal["plain", "tools", "thinking"]
PROPERTY = ("anyOf", "type", "items", "description", "enum", "properties", "required")
"""What Ollama keeps of a parameter's schema, in its order."""


@dataclass(frozen=True)
class Dialogue:
    """A request to Ollama's chat API.

    Messages have role and content, and may have thinking, tool_calls (id, function.name, function.arguments), or for
    the result of a tool its tool_name and tool_call_id. `think` is unset, on, or off.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    think: bool | None = None
    date: datetime.date = datetime.date(2024, 7, 26)


@dataclass(frozen=True)
class Reference:
    """How the model's own template renders: a dialogue, and whether to open the assistant's turn -> the prompt.

    `text` gets dates as `strftime` gives them; it leaves out a BOS that the engine itself adds, and raises SuiteError
    for a dialogue that the template refuses. `eos` is the end-of-text token, which some templates write at the end.
    """

    text: Callable[[Dialogue, bool, Callable[[str], str]], str]
    eos: str = ""

    def prompt(self, dialogue: Dialogue) -> str:
        """What the model is given for `dialogue`, as Ollama hands it over."""
        return self.text(settled(dialogue), True, dialogue.date.strftime)


def go_prompt(template: str, dialogue: Dialogue) -> str:
    """What an Ollama server makes of `dialogue` by a Go template; raises TemplateSyntaxError."""
    return render(template, go_data(dialogue), today=dialogue.date.isoformat())


def settled(dialogue: Dialogue) -> Dialogue:
    """The dialogue as Ollama hands it to a template."""
    return replace(dialogue, messages=collate(dialogue.messages)[1], tools=[_tool(tool) for tool in dialogue.tools])


def collate(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Message]]:
    """The joined system texts, and the messages with neighbours of one role merged.

    >>> collate([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    ('', [{'role': 'user', 'content': 'a\\n\\nb'}])
    """
    system: list[str] = []
    merged: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            system.append(message["content"])
        if merged and merged[-1]["role"] == message["role"] != "tool":
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(_settled(dict(message)))
    return "\n\n".join(system), merged


def go_data(dialogue: Dialogue) -> dict[str, Any]:
    """What Ollama gives a Go template, by the names of its fields."""
    system, merged = collate(dialogue.messages)
    return {
        "System": system,
        "Messages": [_go_message(message) for message in merged],
        "Tools": [_go_tool(_tool(tool)) for tool in dialogue.tools],
        "Response": "",
        "Think": bool(dialogue.think),
        "IsThinkSet": dialogue.think is not None,
    }


def _settled(value: Any) -> Any:
    """Names sorted where Go has a map, and whole numbers without a point: in Go's JSON all numbers are floats."""
    if isinstance(value, dict):
        return {key: _settled(_sorted(item) if key == "arguments" else item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_settled(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value


def _tool(tool: Tool) -> Tool:
    function = tool["function"]
    given = function.get("parameters", {})
    parameters = {"type": given.get("type", "object")}
    if "$defs" in given:
        parameters["$defs"] = _sorted(given["$defs"])
    parameters["properties"] = {
        name: _property(given["properties"][name]) for name in sorted(given.get("properties", {}))
    }
    if given.get("required"):
        parameters["required"] = list(given["required"])
    described = {"description": function["description"]} if function.get("description") else {}
    return {"type": "function", "function": {"name": function["name"], **described, "parameters": parameters}}


def _property(schema: dict[str, Any]) -> dict[str, Any]:
    kept = {name: schema[name] for name in PROPERTY if schema.get(name)}
    if "properties" in kept:
        kept["properties"] = {name: _property(inner) for name, inner in kept["properties"].items()}
    if "anyOf" in kept:
        kept["anyOf"] = [_property(inner) for inner in kept["anyOf"]]
    return {name: _sorted(value) if name == "items" else value for name, value in kept.items()}


def _go_message(message: Message) -> dict[str, Any]:
    return {
        "Role": message["role"],
        "Content": message.get("content") or "",
        "Thinking": message.get("thinking", ""),
        "ToolName": message.get("tool_name", ""),
        "ToolCallID": message.get("tool_call_id", ""),
        "ToolCalls": [
            {
                "ID": call.get("id", ""),
                "Function": {"Name": call["function"]["name"], "Arguments": call["function"]["arguments"]},
            }
            for call in message.get("tool_calls", ())
        ],
    }


def _go_tool(tool: Tool) -> dict[str, Any]:
    function = tool["function"]
    parameters = function["parameters"]
    return {
        "Type": tool["type"],
        "Function": {
            "Name": function["name"],
            "Description": function.get("description", ""),
            "Parameters": {
                "Type": parameters["type"],
                "Defs": parameters.get("$defs"),
                "Required": parameters.get("required", []),
                "Properties": {name: _struct(schema) for name, schema in parameters["properties"].items()},
            },
        },
    }


def _struct(schema: dict[str, Any]) -> Struct:
    found = Struct(schema)
    if "properties" in schema:
        found["properties"] = {name: _struct(inner) for name, inner in schema["properties"].items()}
    if "anyOf" in schema:
        found["anyOf"] = [_struct(inner) for inner in schema["anyOf"]]
    return found


def tool(name: str, description: str = "", **properties: dict[str, Any]) -> Tool:
    """A tool all of whose parameters are required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(name: str, identity: str = "a1b2c3d4e", **arguments: Any) -> dict[str, Any]:
    """A call of a tool."""
    return {"type": "function", "id": identity, "function": {"name": name, "arguments": arguments}}


WEATHER = tool("get_weather", "The weather of a city.", city={"type": "string", "description": "Its name"})
CLOCK = tool("time", 'What "time" it is: <hh:mm> & date\n', zone={"type": "string", "enum": ["UTC", "本地"]})
ORDER = tool(
    "order",
    "Order pizza.",
    extras={"type": "array", "items": {"type": "string"}, "description": "What's on it"},
    size={"type": ["integer", "null"], "description": "In cm, 20 < x < 50"},
)
NOTHING = {"type": "function", "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}}}


@dataclass
class _Talk:
    """Builds a dialogue message by message."""

    messages: list[Message] = field(default_factory=list)

    def say(self, role: str, content: str = "", **more: Any) -> _Talk:
        return _Talk([*self.messages, {"role": role, "content": content, **more}])

    def ask(self, content: str = "What is it like in Köln?") -> _Talk:
        return self.say("user", content)

    def answer(self, content: str = "It is fine.", **more: Any) -> _Talk:
        return self.say("assistant", content, **more)

    def calls(self, *calls: dict[str, Any], content: str = "", **more: Any) -> _Talk:
        return self.say("assistant", content, tool_calls=list(calls), **more)

    def result(self, content: str = '{"sky": "grey"}', name: str = "get_weather", identity: str = "a1b2c3d4e") -> _Talk:
        return self.say("tool", content, tool_name=name, tool_call_id=identity)


def _plain() -> dict[str, _Talk]:
    def talk(roles: str, *texts: str) -> _Talk:
        names = {"s": "system", "u": "user", "a": "assistant"}
        found = texts or tuple(f"Text {i}: 你好, {role}." for i, role in enumerate(roles))
        return _Talk([{"role": names[role], "content": text} for role, text in zip(roles, found, strict=True)])

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
        "white space at the ends": talk("suau", " s \n", "\n  u  ", " a ", "u\n\n"),
        "white space at the ends, and no system text": talk("uau", "\n  u　 ", " a\t", "\xa0u\n\n"),
        "special tokens as text": talk("u", "<|im_end|> <s> </s> [INST] <|eot_id|>"),
        "emoji and controls": talk("u", "👩‍🚀 \t​é"),
    }


def _with_tools() -> dict[str, tuple[_Talk, Sequence[Tool]]]:
    asked = _Talk().ask()
    one = asked.calls(call("get_weather", city="Köln"))
    tricky = call(
        "order",
        extras=['"ham" <b>&</b>', "Käse\n\\", "\u2028\x07"],
        hot=True,
        size=-3,
        deep={"b": [1.5, {}], "a": None},
    )
    two = asked.calls(call("get_weather", "a1b2c3d4e", city="a"), call("time", "f6g7h8i9j", zone="UTC"))
    both = [WEATHER, CLOCK]
    return {
        "one tool": (asked, [WEATHER]),
        "tools and a system text": (_Talk().say("system", "Be brief.").ask(), both),
        "tools and an empty system text": (_Talk().say("system").ask(), both),
        "tools with lists, quotes, and without parameters": (asked, [ORDER, CLOCK, NOTHING]),
        "tools, several turns": (asked.answer().ask("And in Rome?").answer().ask("Why?"), both),
        "a call and its result": (one.result(), [WEATHER]),
        "a call and its result after a system text": (
            _Talk([{"role": "system", "content": "Be brief."}, *one.result().messages]),
            both,
        ),
        "a call and its result, without tools": (one.result(), []),
        "a call, its result, an answer, a question": (one.result().answer().ask("Thanks!"), both),
        "a second call": (one.result().calls(call("time", "f6g7h8i9j")).result("12:00", "time", "f6g7h8i9j"), both),
        "a second call later on": (
            one.result().answer().ask("And now?").calls(call("get_weather", city="Rome")).result("sun"),
            both,
        ),
        "two calls at once": (two.result().result("12:00", "time", "f6g7h8i9j"), both),
        "two calls at once, then a question": (
            two.result().result("12:00", "time", "f6g7h8i9j").answer().ask("Thanks!"),
            both,
        ),
        "a call with a text": (asked.calls(call("get_weather", city="Köln"), content="I look.").result(), both),
        "a call with difficult arguments": (asked.calls(tricky).result("<ok> & {{ . }}\n", "order"), [ORDER]),
        "an empty result": (one.result(""), [WEATHER]),
    }


def _with_thinking() -> dict[str, tuple[_Talk, Sequence[Tool]]]:
    asked = _Talk().ask()
    thought = asked.answer(thinking="It is autumn.").ask("Why?")
    called = asked.calls(call("get_weather", city="Köln"), thinking="I look.\n\nNow.").result()
    return {
        "a question": (asked, []),
        "a question after a system text": (_Talk().say("system", "Be brief.").ask(), []),
        "several turns": (asked.answer().ask("Why?"), []),
        "thinking in an earlier answer": (thought, []),
        "a call after thinking": (called, [WEATHER]),
        "a call after thinking, then a question": (called.answer(thinking="Grey, then.").ask("Thanks!"), [WEATHER]),
        "a call without thinking": (asked.calls(call("get_weather", city="Köln")).result(), [WEATHER]),
    }


def probes() -> dict[Kind, dict[str, Dialogue]]:
    """Dialogues by kind and by a name that says what is special about each; all end with a question or a result."""
    found: dict[Kind, dict[str, Dialogue]] = {
        "plain": {name: Dialogue(talk.messages) for name, talk in _plain().items()},
        "tools": {name: Dialogue(talk.messages, tools) for name, (talk, tools) in _with_tools().items()},
        "thinking": {},
    }
    for name, (talk, tools) in _with_thinking().items():
        for think, said in ((None, "unset"), (True, "on"), (False, "off")):
            found["tools" if tools else "thinking"][f"{name}, think {said}"] = Dialogue(talk.messages, tools, think)
    return found
