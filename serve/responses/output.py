"""What a response says, item by item as it comes, and the events that tell of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from serve.calls import Part

Event = dict[str, Any]


class Output:
    """The items of a response: reasoning, messages and calls of functions, made of the parts of a reply in their order.

    An item's events:  output_item.added  content_part.added  *.delta ...  *.done  content_part.done  output_item.done
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: Part | None = None
        """The part that began the last item, while more of it may come."""

    def add(self, parts: Sequence[Part]) -> Iterator[Event]:
        """Go on with `parts`."""
        for part in parts:
            if part.kind == "call" or self._open is None or self._kind(part) != self._kind(self._open):
                yield from self.close()
                self._open = part
                yield from self._begin(part)
            if part.kind != "call":
                yield self._more(part.text)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """End the last item."""
        if self._open is None:
            return
        item, at = self.items[-1], self._at
        self._open = None
        item["status"] = status
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **at, **done}
        else:
            content = item["content"][0]
            told = {"text": content["text"], **({"logprobs": []} if item["type"] == "message" else {})}
            yield {"type": f"response.{content['type']}.done", **at, "content_index": 0, **told}
            yield {"type": "response.content_part.done", **at, "content_index": 0, "part": dict(content)}
        yield {"type": "response.output_item.done", "output_index": at["output_index"], "item": _copy(item)}

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    @staticmethod
    def _kind(part: Part) -> str:
        return "call" if part.kind == "arguments" else part.kind

    def _begin(self, part: Part) -> Iterator[Event]:
        kind, item = self._kind(part), dict[str, Any]()
        if kind == "call":
            names = {"call_id": uuid.uuid4().hex[:9], "name": part.text, "arguments": ""}
            item = {"id": _id("fc"), "type": "function_call", "status": "in_progress", **names}
        elif kind == "reasoning":
            item = {"id": _id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        else:
            item = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}
        if kind != "call":
            content: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "content":
                content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"] = [content]
            yield {"type": "response.content_part.added", **self._at, "content_index": 0, "part": dict(content)}

    def _more(self, text: str) -> Event:
        item, at = self.items[-1], self._at
        if item["type"] == "function_call":
            item["arguments"] += text
            return {"type": "response.function_call_arguments.delta", **at, "delta": text}
        content = item["content"][0]
        content["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        return {"type": f"response.{content['type']}.delta", **at, "content_index": 0, "delta": text, **logprobs}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
