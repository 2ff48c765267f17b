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

import json
import re
from collections.abc import Collection, Sequence
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
                    [self._adapted(message) for message in messages],
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
        text = self.text(messages, tools, **template_kwargs)
        _check_complete(text, messages, tools)
        if _MARKS.search(self.tokenizer.get_chat_template(None, tools)):
            spans = self._marked(text, messages, tools, template_kwargs)
        else:
            spans = self._rendered(text, messages, tools, template_kwargs)
        if spans[-1][1] == len(text) and not text.rstrip().endswith(self._special):
            text += self._closing(text, messages, tools, template_kwargs)
        spans = [(start, self._end(text, start, end)) for start, end in spans]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = [begin if begin < end else -1 for begin, end in encoded["offset_mapping"]]
        mask = [0] * len(begins)
        for start, end in spans:
            for index, begin in enumerate(begins):
                mask[index] |= start <= begin < end
        return list(encoded["input_ids"]), mask

    @cached_property
    def _special(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether the template pastes a tool call's arguments as they are, so that they must be JSON text."""
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"k": True}}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        from jinja2 import TemplateError

        try:
            return "{'k': True}" in self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TypeError:
            return True
        except (TemplateError, ValueError, KeyError, AttributeError):
            return False

    def _adapted(self, message: Message) -> Message:
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

    def _marked(
        self, text: str, messages: Sequence[Message], tools: Sequence[Tool] | None, kwargs: dict[str, Any]
    ) -> list[Span]:
        """Where the template's `{% generation %}` blocks are in `text`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[[self._adapted(message) for message in messages]],
            tools=list(tools) if tools else None,
            chat_template=self.tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        marked: list[Span] = [(start, end) for start, end in spans[0] if start < end]
        if rendered[0] != text or len(marked) < len(turns):
            raise _unsafe(f"its generation marks cover {len(marked)} of {len(turns)} assistant turns")
        prompt = self.text(messages[: turns[-1]], tools, generate=True, **kwargs)
        shared, start = _common_prefix(text, prompt), marked[-1][0]
        if start < shared <= marked[-1][1]:
            raise _unsafe(f"its generation marks take in {text[start:shared]!r}, which the prompt gives")
        self._check_last(text, prompt, messages)
        return marked

    def _rendered(
        self, text: str, messages: Sequence[Message], tools: Sequence[Tool] | None, kwargs: dict[str, Any]
    ) -> list[Span]:
        """Where the assistant turns are in `text`, from rendering the conversation up to and after each."""
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.text(messages[:index], tools, generate=True, **kwargs)
            until = text if index == len(messages) - 1 else self.text(messages[: index + 1], tools, **kwargs)
            if text.startswith(until) and until.startswith(prompt):
                spans.append((len(prompt), len(until)))
            else:
                floor = spans[-1][1] if spans else 0
                spans.append(self._searched(text, messages, index, prompt, floor, tools, kwargs))
            if spans[-1][0] >= spans[-1][1]:
                raise _unsafe(f"it renders nothing for message {index + 1}")
            if any(special in _common_suffix(prompt, until) for special in self._special):
                raise _unsafe(f"it does not heed add_generation_prompt: both texts end with {prompt[-40:]!r}")
        self._check_last(text, prompt, messages)
        return spans

    def _check_last(self, text: str, prompt: str, messages: Sequence[Message]) -> None:
        """The last turn must go on from exactly what the server would send."""
        if messages[-1]["role"] == "assistant" and not text.startswith(prompt):
            differs = _common_prefix(text, prompt)
            raise _unsafe(
                f"the server's prompt goes on with {prompt[differs:][:60]!r}, this with {text[differs:][:60]!r}"
            )

    def _searched(
        self,
        text: str,
        messages: Sequence[Message],
        index: int,
        prompt: str,
        floor: int,
        tools: Sequence[Tool] | None,
        kwargs: dict[str, Any],
    ) -> Span:
        """Where turn `index` is in `text` when later messages change how earlier ones are rendered.

        Templates do so that drop the reasoning of earlier turns or put the system text into the last question. A
        stand-in for the answer shows how the text goes on after the turn, and the longest tail of the prompt that
        stands in `text` before it shows where the turn begins.
        """

        def around(until: int | None) -> tuple[str, str]:
            for stand_in in _stand_ins(messages[index]):
                changed = [*messages[:index], stand_in, *messages[index + 1 :]]
                try:
                    before, *after = self.text(changed[:until], tools, **kwargs).split(_STAND_IN)
                except SuiteError:
                    continue
                if len(after) == 1:
                    return before, after[0]
            raise _unsafe(f"it does not render the content of message {index + 1} once")

        before, after = around(None)
        ending = self._shared_ending(around(index + 1)[1], after)
        if not text.endswith(after) or ending is None:
            raise _unsafe(f"it renders message {index + 1} differently when others follow")
        end = len(text) - len(after) + len(ending)
        opening = _common_prefix(text, before)
        history = self.text(messages[:index], tools, **kwargs)
        header = prompt[_common_prefix(prompt, history) :]
        shared = _longest_tail(prompt, text[floor:opening])
        if not shared.strip() or len(shared) < len(header):
            raise _unsafe(
                f"the server's prompt for message {index + 1} ends with {prompt[-60:]!r}, which the whole conversation "
                "does not have there"
            )
        return text.rindex(shared, floor, opening) + len(shared), end

    def _shared_ending(self, ending: str, after: str) -> str | None:
        """What follows an answer both when its turn is the last and when others follow, up to a special token.

        Templates may add an end of text after the last turn only.
        """
        if after.startswith(ending):
            return ending
        shared = ending[: _common_prefix(ending, after)]
        ends = [shared.rindex(special) + len(special) for special in self._special if special in shared]
        return shared[: max(ends)] if ends else None

    def _closing(
        self, text: str, messages: Sequence[Message], tools: Sequence[Tool] | None, kwargs: dict[str, Any]
    ) -> str:
        """The stop token that would follow `text` if the user went on; empty when it is none."""
        try:
            longer = self.text([*messages, {"role": "user", "content": _STAND_IN}], tools, **kwargs)
        except SuiteError:
            return ""
        return next((stop for stop in self._stop_texts if longer.startswith(text + stop)), "")

    @cached_property
    def _stop_texts(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.stops)))

    def _end(self, text: str, start: int, end: int) -> int:
        """`end` moved to just after the token that ends the turn: nothing after that token is ever generated."""
        stops = [at + len(stop) for stop in self._stop_texts if (at := text.find(stop, start, end)) >= 0]
        end = min([end, *stops])
        turn = text[start:end].rstrip()
        if turn.endswith(self._special):
            return start + len(turn)
        return end + len(next((stop for stop in self._stop_texts if text.startswith(stop, end)), ""))


def _unsafe(reason: str) -> SuiteError:
    return SuiteError(
        f"the chat template cannot be split safely into prompt and answer: {reason}",
        hint="edit the base's chat_template.jinja so that an assistant's turn goes on from the generation prompt, "
        "and put {% generation %} ... {% endgeneration %} around what the assistant writes",
    )


def _check_complete(text: str, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Raise SuiteError when the template drops an answer or a tool; only reasoning may be left out."""
    for number, message in enumerate(messages, 1):
        if (
            message["role"] == "assistant"
            and (message.get("content") or "").rpartition("</think>")[2].strip() not in text
        ):
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


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _common_suffix(a: str, b: str) -> str:
    return a[len(a) - _common_prefix(a[::-1], b[::-1]) :]


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
