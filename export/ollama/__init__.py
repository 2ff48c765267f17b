"""A model for Ollama: a Go template that gives the same prompts as the model's own Jinja, and the model itself.

The template is derived (`derive.py`) and then compared with the Jinja, byte for byte, on every dialogue of
`dialogues.py`. Where no template is equal for all of them, the best one says for which it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.gguf.tokenizer import chat_template
from export.ollama.derive import derive
from export.ollama.dialogues import Dialogue, Kind, Message, Reference, go_prompt, probes
from export.ollama.gofunctions import TemplateSyntaxError
from export.ollama.marks import refused
from suite.chat import Chat
from suite.errors import SuiteError

Unequal = Literal["stop", "warn"]


@dataclass(frozen=True)
class GoTemplate:
    """A Go template; by kind, for how many dialogues it gives the prompt of the model's own; where it does not."""

    text: str
    equal: dict[Kind, int]
    differs: dict[str, str]

    @property
    def wrong(self) -> tuple[int, int]:
        """How many dialogues differ: those without tools and thinking, which count most, and all."""
        return len(self.plain), len(self.differs)

    @property
    def plain(self) -> list[str]:
        """The dialogues without tools and thinking that differ."""
        return [name for name in self.differs if name.startswith("plain: ")]

    def as_json(self) -> dict[str, Any]:
        """For the metrics of an export."""
        return {"dialogues": sum(self.equal.values()), "equal": self.equal, "differs": sorted(self.differs)}


def reference(folder: Path) -> Reference:
    """How the model in `folder` renders dialogues."""
    return reference_of(Chat.load(folder))


def reference_of(chat: Chat) -> Reference:
    """How `chat` renders dialogues, as the text that an engine has to be given."""
    bos = chat.tokenizer.bos_token or ""
    added = bool(bos) and chat.tokenizer("")["input_ids"][:1] == [chat.tokenizer.bos_token_id]

    def text(dialogue: Dialogue, generate: bool, date: Callable[[str], str]) -> str:
        messages = [as_jinja(message) for message in dialogue.messages]
        more = {} if dialogue.think is None else {"enable_thinking": dialogue.think}
        rendered = chat.text(messages, dialogue.tools, generate, strftime_now=date, **more)
        return rendered.removeprefix(bos) if added else rendered

    return Reference(text, chat.tokenizer.eos_token or "")


def go_template(model: Reference, unequal: Unequal = "stop") -> GoTemplate:
    """The Go template that is equal for most dialogues; raises SuiteError where there is none.

    With `unequal` = "stop" it also raises where one is not equal for all dialogues, naming those that differ.
    """
    best: GoTemplate | None = None
    refusals: list[SuiteError] = []
    for tools, thinking in ((True, True), (False, True), (True, False), (False, False)):
        try:
            found = compared(model, derive(model, tools, thinking))
        except SuiteError as error:
            refusals.append(error)
            continue
        if best is None or found.wrong < best.wrong:
            best = found
        if not best.differs:
            return best
        if refusals and all(name.startswith("tools: ") for name in best.differs):
            break  # with tools it was refused, and all else is equal
    if best is None:
        raise refusals[0]
    if unequal == "stop":
        raise _unequal(best, best.plain or list(best.differs), refusals)
    return best


def compared(model: Reference, text: str) -> GoTemplate:
    """The Go template `text`, with what comparing it with the model's own found; what that refuses is left out."""
    equal: dict[Kind, int] = {}
    differs: dict[str, str] = {}
    for kind, dialogues in probes().items():
        equal[kind] = 0
        for name, dialogue in dialogues.items():
            try:
                expected = model.prompt(dialogue)
            except SuiteError:
                continue
            try:
                found = go_prompt(text, dialogue)
            except TemplateSyntaxError as error:
                found = f"an error: {error}"
            if found == expected:
                equal[kind] += 1
            else:
                differs[f"{kind}: {name}"] = f"it would be {found!r}, where the model expects {expected!r}"
    return GoTemplate(text, equal, differs)


def preferred(jinja: str, template: GoTemplate | None) -> bool:
    """Whether Ollama renders the Jinja in the GGUF although the Modelfile has a Go template.

    It does when the Jinja can do more, as far as Ollama sees by words in both (server/images.go of 2026).
    """
    if template is None:
        return True
    more_tools = ("tools" in jinja or "tool_call" in jinja) and "$.Tools" not in template.text
    more_thinking = "<think>" in jinja and "</think>" in jinja and ".Thinking }}" not in template.text
    return more_tools or more_thinking


def notes(folder: Path, template: GoTemplate | None) -> list[str]:
    """What a user of the package has to know about its prompts: for the model card and the Modelfile."""
    jinja = chat_template(folder)
    found = []
    if template is None:
        found.append(
            "Ollama renders the model's own Jinja template, which is in the GGUF. It takes another template when the "
            'Jinja resembles one that it knows: `ollama create` then says "using autodetected template". Start the '
            "server with OLLAMA_GO_TEMPLATE=0 to prevent that."
        )
    else:
        counts = ", ".join(f"{n} {kind}" for kind, n in template.equal.items() if n)
        found.append(f"The template gives the same prompt as the model's own for all probe dialogues ({counts}).")
        if template.differs:
            names = "; ".join(template.differs)
            found[0] = (
                f"The template gives the same prompt as the model's own for {counts} dialogues, not for: {names}."
            )
        if "$.Tools" in template.text:
            found.append(
                "Ollama sorts parameters and arguments by name, and drops what it does not know of a tool's schema, "
                "before any Go template sees them."
            )
        if preferred(jinja, template):
            found.append(
                "The Jinja in the GGUF can do more than the Go template, so current versions of Ollama render the "
                "Jinja. Start the server with OLLAMA_GO_TEMPLATE=1 for the Go template."
            )
    if "enable_thinking" in jinja:
        found.append(
            'Set "think" to true or false in requests: left out, Ollama switches thinking on where it sees it.'
        )
    return found


def check(folder: Path) -> None:
    """Raises SuiteError for a model without a chat template."""
    if not chat_template(folder):
        raise SuiteError("the model has no chat template, which Ollama needs", where=str(folder))


def _unequal(template: GoTemplate, names: list[str], refusals: list[SuiteError]) -> SuiteError:
    first = template.differs[names[0]]
    reason = f" ({refusals[0].message})" if refusals else ""
    error = refused(f"{len(names)} dialogues differ, {', '.join(names)}{reason}; the first: {first}")
    return SuiteError(error.message, hint=f'unequal = "warn" goes on with those that are equal; {error.hint}')


def as_jinja(message: Message) -> Message:
    """A message with the names that templates of Hugging Face know."""
    names = {"thinking": "reasoning_content", "tool_name": "name"}
    return {names.get(name, name): value for name, value in message.items()}
