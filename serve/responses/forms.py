"""A response as one object, and as a stream of events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from serve import forms
from serve.answers import Answer, Group
from serve.errors import ApiError
from serve.reply import Reply
from serve.responses.output import Event, Output
from serve.responses.protocol import ResponsesBody


class Response:
    """The response to one request, by the model `name`: whole, or as events."""

    def __init__(self, body: ResponsesBody, name: str, reply: Reply) -> None:
        self._reply, self._output = reply, Output()
        self._told = 0
        self._object: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": name,
            "output": self._output.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": body.text.model_dump(exclude_none=True) if body.text else {"format": {"type": "text"}},
            "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response to an answer that has ended."""
        for _ in self._add(answer):
            pass
        return self._object

    async def lines(self, group: Group) -> AsyncIterator[bytes]:
        """Server-sent events. An error says what it would as an answer of its own; the response failed then."""
        for kind in ("response.created", "response.in_progress"):
            yield self._line({"type": kind, "response": self._object})
        try:
            async for _, answer in group.changes():
                for event in self._add(answer):
                    yield self._line(event)
        except ApiError as error:
            said = error.body["error"]
            told = {"code": said["code"] or said["type"], "message": said["message"], "param": said["param"]}
            yield self._line({"type": "error", **told})
            # of its codes, the only one that lays a fault of no other kind to the request
            code = "server_error" if error.status >= 500 else "invalid_prompt"
            self._object |= {"status": "failed", "error": {"code": code, "message": said["message"]}}
            yield self._line({"type": "response.failed", "response": self._object})

    def _add(self, answer: Answer) -> Iterator[Event]:
        """What is new of the answer."""
        yield from self._output.add(self._reply.feed(answer.text.take(answer.ended), answer.ended))
        if not answer.ended:
            return
        status = "incomplete" if answer.generation.finish == "length" else "completed"
        yield from self._output.close(status)
        self._object |= {"status": status, "usage": self._usage(answer)}
        if status == "incomplete":
            self._object["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._object["completed_at"] = int(time.time())
        yield {"type": f"response.{status}", "response": self._object}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        used = forms.usage([answer], 1)
        thought = answer.text.tokenizer(self._reply.reasoning, add_special_tokens=False)["input_ids"]
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {**used["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": len(thought)},
            "total_tokens": used["total_tokens"],
        }

    def _line(self, event: Event) -> bytes:
        line = b"event: %b\n%b" % (event["type"].encode(), forms.event({**event, "sequence_number": self._told}))
        self._told += 1
        return line
