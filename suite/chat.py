"""The one chat template: the tokenizer's own Jinja turns a conversation into text, ids, and what of them is learnt.

Training, serving, evaluation and export all use `Chat`, so what a model was trained on is what it is asked.

Which tokens are learnt comes from rendering, not from a table of template names. `{% generation %}` marks are used
where the template has them. Elsewhere the prompt before each assistant turn is rendered as the server would render
it, and the turn is what the whole text has after that prompt:

    whole    <|user|>Hi<|assistant|>Hello!<|end|><|user|>Bye<|assistant|>See you.<|end|>
    prompt   <|user|>Hi<|assistant|>                          the server's prompt for the first turn
    learnt                          Hello!<|end|>             up to where the turn alone would end
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from suite.errors import SuiteError

Message = dict[str, Any]
Tool = dict[str, Any]
Span = tuple[int, int]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "QxStandInForTheAnswerQx"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; raises SuiteError when there is none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise SuiteError("has no tokenizer.json", where=str(folder), hint="copy the base model's tokenizer files here")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SuiteError(f"the tokenizer cannot be loaded: {reason}", where=str(folder)) from error


class Chat:
    """Renders conversations with `tokenizer`'s template.

    `stops` are the ids that end a turn; beside the tokenizer's own eos they come from generation_config.json, see
    `load`. Raises SuiteError when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, stops: Collection[int] = ()) -> None:
        if not tokenizer.chat_template:
            raise SuiteError(
                "the tokenizer has no chat template",
                where=str(tokenizer.name_or_path),
                hint="use the family's instruction-tuned model, or put its chat_template.jinja beside tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.stops = frozenset({*stops, tokenizer.eos_token_id} - {None})

    @classmethod
    def load(cls, folder: Path) -> Chat:
        """The chat of a model or adapter folder, with the stop ids of its generation_config.json."""
        file = folder / "generation_config.json"
        stops = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
        return cls(load_tokenizer(folder), stops if isinstance(stops, list) else [] if stops is None else [stops])

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        generate: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as the model reads it; `generate` adds what opens the assistant's turn.

        Raises SuiteError when the template refuses it.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [self.adapted(message) for message in messages],
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **template_kwargs,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise SuiteError(f"the chat template refuses a conversation of {roles}: {error}") from error

    def ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        generate: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of `text(...)`; special tokens come from the template alone."""
        text = self.text(messages, tools, generate, **template_kwargs)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def learnt(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **template_kwargs: Any
    ) -> tuple[list[int], list[int]]:
        """Ids of the whole conversation (T,) and a 0/1 mask (T,) of what is learnt.

        Learnt are all assistant turns, each with the token that ends it, and nothing else. The text is tokenised
        once and whole, so the ids are those of `ids(...)`; a token is learnt when it begins inside a turn. Where a
        template ends a turn only by the token that opens the next (GLM), that token is added after the last one.
        Raises SuiteError when the template cannot be split safely.
        """
        text, spans = _Split(self, messages, tools, template_kwargs).turns()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = [begin if begin < end else -1 for begin, end in encoded["offset_mapping"]]
        mask = [int(any(start <= begin < end for start, end in spans)) for begin in begins]
        return list(encoded["input_ids"]), mask

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The texts of the special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def turn_end(self) -> int | None:
        """The special token that the template writes after an answer; None where it writes none, or refuses to."""
        try:
            text = self.text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _STAND_IN}])
        except SuiteError:
            return None
        after = text.rpartition(_STAND_IN)[2].lstrip()
        fitting = [special for special in self.special if after.startswith(special)]
        return int(self.tokenizer.convert_tokens_to_ids(max(fitting, key=len))) if fitting else None

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of the tokens that end a turn."""
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.stops)))

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether the template pastes a tool call's arguments as they are, so that they must be JSON text."""
        from jinja2 import TemplateError

        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"k": True}}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            return "{'k': True}" in self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TypeError:
            return True
        except (TemplateError, ValueError, KeyError, AttributeError):
            return False

    def adapted(self, message: Message) -> Message:
        """`message` with the arguments of its tool calls as the template wants them: an object, or JSON text."""
        if not message.get("tool_calls"):
            return message
        calls = []
        for call in message["tool_calls"]:
            function = dict(call.get("function", call))
            arguments = function.get("arguments") or {}
            if self._arguments_as_text and not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            elif not self._arguments_as_text and isinstance(arguments, str):
                arguments = _object(arguments)
            calls.append({**call, "function": {**function, "arguments": arguments}})
        return {**message, "tool_calls": calls}


@dataclass(frozen=True)
class _Split:
    """One conversation being split into what the server gives and what the assistant says."""

    chat: Chat
    messages: Sequence[Message]
    tools: Sequence[Tool] | None
    template_kwargs: dict[str, Any]

    def turns(self) -> tuple[str, list[Span]]:
        """The text of the conversation, and where in it the assistant's turns are, each with its end."""
        text = self.render(self.messages)
        if not any(message["role"] == "assistant" for message in self.messages):
            return text, []
        _check_complete(text, self.messages, self.tools)
        marks = _MARKS.search(self.chat.tokenizer.get_chat_template(None, self.tools))
        spans = self.marked(text) if marks else self.rendered(text)
        if spans[-1][1] == len(text) and not text.rstrip().endswith(self.chat.special):
            text += self.closing(text)
        return text, [(start, self.end(text, start, end)) for start, end in spans]

    def render(self, messages: Sequence[Message], generate: bool = False) -> str:
        """Another conversation with the same tools and template variables."""
        return self.chat.text(messages, self.tools, generate, **self.template_kwargs)

    def marked(self, text: str) -> list[Span]:
        """Where the template's `{% generation %}` blocks are in `text`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[[self.chat.adapted(message) for message in self.messages]],
            tools=list(self.tools) if self.tools else None,
            chat_template=self.chat.tokenizer.get_chat_template(None, self.tools),
            return_assistant_tokens_mask=True,
            **{**self.chat.tokenizer.special_tokens_map, **self.template_kwargs},
        )
        turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        marked: list[Span] = [(start, end) for start, end in spans[0] if start < end]
        if rendered[0] != text or len(marked) < len(turns):
            raise _unsafe(f"its generation marks cover {len(marked)} of {len(turns)} assistant turns")
        prompt = self.render(self.messages[: turns[-1]], generate=True)
        shared, start = common_prefix(text, prompt), marked[-1][0]
        if start < shared <= marked[-1][1]:
            raise _unsafe(f"its generation marks take in {text[start:shared]!r}, which the prompt gives")
        self.check_last(text, prompt)
        return marked

    def rendered(self, text: str) -> list[Span]:
        """Where the assistant turns are in `text`, from rendering the conversation up to and after each."""
        spans: list[Span] = []
        prompt = ""
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(self.messages[:index], generate=True)
            until = text if index == len(self.messages) - 1 else self.render(self.messages[: index + 1])
            if text.startswith(until) and until.startswith(prompt):
                spans.append((len(prompt), len(until)))
            else:
                spans.append(self.searched(text, index, prompt, spans[-1][1] if spans else 0))
            if spans[-1][0] >= spans[-1][1]:
                raise _unsafe(f"it renders nothing for message {index + 1}")
            if any(special in common_suffix(prompt, until) for special in self.chat.special):
                raise _unsafe(f"it does not heed add_generation_prompt: both texts end with {prompt[-40:]!r}")
        self.check_last(text, prompt)
        return spans

    def check_last(self, text: str, prompt: str) -> None:
        """The last turn must go on from exactly what the server would send."""
        if self.messages[-1]["role"] == "assistant" and not text.startswith(prompt):
            at = common_prefix(text, prompt)
            raise _unsafe(f"the server's prompt goes on with {prompt[at:][:60]!r}, this with {text[at:][:60]!r}")

    def searched(self, text: str, index: int, prompt: str, floor: int) -> Span:
        """Where turn `index` is in `text[floor:]` when later messages change how earlier ones are rendered.

        Templates do so that drop the reasoning of earlier turns or put the system text into the last question. A
        stand-in for the answer shows how the text goes on after the turn, and the longest tail of the prompt that
        stands in `text` before it shows where the turn begins.
        """
        before, after = self.around(index, len(self.messages))
        ending = self.shared_ending(self.around(index, index + 1)[1], after)
        if not text.endswith(after) or ending is None:
            raise _unsafe(f"it renders message {index + 1} differently when others follow")
        opening = common_prefix(text, before)
        header = prompt[common_prefix(prompt, self.render(self.messages[:index])) :]
        shared = _longest_tail(prompt, text[floor:opening])
        if not shared.strip() or len(shared) < len(header):
            raise _unsafe(
                f"the server's prompt for message {index + 1} ends with {prompt[-60:]!r}, which the whole conversation "
                "does not have there"
            )
        return text.rindex(shared, floor, opening) + len(shared), len(text) - len(after) + len(ending)

    def around(self, index: int, until: int) -> tuple[str, str]:
        """The text before and after the answer of turn `index` in the first `until` messages."""
        for stand_in in _stand_ins(self.messages[index]):
            changed = [*self.messages[:index], stand_in, *self.messages[index + 1 : until]]
            with contextlib.suppress(SuiteError):
                before, *after = self.render(changed).split(_STAND_IN)
                if len(after) == 1:
                    return before, after[0]
        raise _unsafe(f"it does not render the content of message {index + 1} once")

    def shared_ending(self, ending: str, after: str) -> str | None:
        """What follows an answer both when its turn is the last and when others follow, up to a special token.

        Templates may add an end of text after the last turn only.
        """
        if after.startswith(ending):
            return ending
        shared = ending[: common_prefix(ending, after)]
        ends = [shared.rindex(special) + len(special) for special in self.chat.special if special in shared]
        return shared[: max(ends)] if ends else None

    def closing(self, text: str) -> str:
        """The stop token that would follow `text` if the user went on; empty when it is none."""
        with contextlib.suppress(SuiteError):
            longer = self.render([*self.messages, {"role": "user", "content": _STAND_IN}])
            return next((stop for stop in self.chat.stop_texts if longer.startswith(text + stop)), "")
        return ""

    def end(self, text: str, start: int, end: int) -> int:
        """`end` moved to just after the token that ends the turn: nothing after that token is ever generated."""
        stops = [at + len(stop) for stop in self.chat.stop_texts if (at := text.find(stop, start, end)) >= 0]
        end = min([end, *stops])
        turn = text[start:end].rstrip()
        if turn.endswith(self.chat.special):
            return start + len(turn)
        return end + len(next((stop for stop in self.chat.stop_texts if text.startswith(stop, end)), ""))


def _unsafe(reason: str) -> SuiteError:
    return SuiteError(
        f"the chat template cannot be split safely into prompt and answer: {reason}",
        hint="edit the base's chat_template.jinja so that an assistant's turn goes on from the generation prompt, "
        "and put {% generation %} ... {% endgeneration %} around what the assistant writes",
    )


def _check_complete(text: str, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Raise SuiteError when the template drops an answer or a tool; only reasoning may be left out."""
    for number, message in enumerate(messages, 1):
        said = (message.get("content") or "").rpartition("</think>")[2].strip()
        if message["role"] == "assistant" and said not in text:
            raise SuiteError(f"the chat template leaves out what message {number} says")
    called = [call for message in messages for call in message.get("tool_calls") or ()]
    for function in (entry.get("function", entry) for entry in [*(tools or ()), *called]):
        if function["name"] not in text:
            raise SuiteError(
                f"the chat template leaves out the tool '{function['name']}'",
                hint="use a base whose template knows tools, or leave the tools out of the data",
            )


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments


def _stand_ins(message: Message) -> list[Message]:
    """The message with a stand-in as content, as the name of its first tool call, and as content without calls."""
    changed = [{**message, "content": _STAND_IN}]
    if message.get("tool_calls"):
        first, *others = message["tool_calls"]
        named = {**first, "function": {**first.get("function", first), "name": _STAND_IN}}
        changed.append({**message, "tool_calls": [named, *others]})
    return [*changed, {"role": message["role"], "content": _STAND_IN}]


def common_prefix(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def common_suffix(a: str, b: str) -> str:
    """What `a` and `b` end with alike."""
    return a[len(a) - common_prefix(a[::-1], b[::-1]) :]


def _longest_tail(text: str, inside: str) -> str:
    """The longest suffix of `text` that occurs in `inside`.

    >>> _longest_tail("[INST] a [/INST]", "[INST] b [/INST] b")
    ' [/INST]'
    """
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[-middle:] in inside else (low, middle - 1)
    return text[len(text) - low :]
