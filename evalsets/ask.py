"""Ask an OpenAI endpoint many things at once, and lose nothing.

Every answer is appended to a journal as it arrives, so a killed run continues where it was. What the journal makes of
an answer may take long, and follows from a thread, for nothing else would be read meanwhile. What is sent again is only
what the endpoint did not answer at all or asked to have sent again (no connection, 429, 5xx), after a growing pause.
Whatever else goes wrong with a request, a time-out and an unreadable answer too, is a failed reply with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from evalsets.aside import aside
from suite.errors import SuiteError, near

LONGEST_PAUSE = 30.0
AGAIN = {429, *range(500, 600)} - {501}
"""Statuses after which a request is sent again; 501 says that the endpoint does not do such things."""
FEWEST_LOST = 8
"""After so many requests in a row (or `concurrency`, if that is more) without any answer, the rest is not asked."""
encode = json.JSONEncoder(ensure_ascii=False).encode
"""One for all lines: `json.dumps` makes one for each."""


@dataclass(frozen=True)
class Request:
    """One POST to `/v1/{path}`; `id` is the question's."""

    id: str
    path: str
    body: Mapping[str, Any]

    @cached_property
    def content(self) -> bytes:
        """The body as it is sent."""
        return json.dumps(self.body, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")

    @cached_property
    def digest(self) -> str:
        """Identity of what is sent: a journal's answer is used again only where this is equal."""
        return hashlib.sha256(self.path.encode() + b" " + self.content).hexdigest()[:16]


@dataclass(frozen=True)
class Reply:
    """What came back. A reply with an `error` has nothing else.

    `refused` says that the endpoint understood and does not do what was asked (4xx, or no logprobs where they were
    asked for). `logprobs` are of the prompt's tokens after the first, for requests that echo it. Latency in seconds,
    of the last attempt.
    """

    id: str
    digest: str
    text: str = ""
    finish: str = ""
    tokens: int = 0
    logprobs: tuple[float, ...] = ()
    latency: float = 0.0
    attempts: int = 1
    error: str = ""
    refused: bool = False


class Journal:
    """Replies as they come, each at once as a line of JSON, in a file that outlives a kill at any moment.

    A kind with lines of its own overrides `line` and `reply`, each the other's inverse, and `after`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, request: Request, reply: Reply) -> dict[str, Any]:
        """What is kept of a reply."""
        del request
        return vars(reply)

    def reply(self, line: dict[str, Any]) -> Reply:
        """The reply that left a line; raises ValueError, KeyError or TypeError for a line that is none."""
        return Reply(**line | {"logprobs": tuple(line["logprobs"])})

    def after(self, request: Request, reply: Reply) -> dict[str, Any] | None:
        """A line that follows later, which is no reply: what takes time to find out, and may fail; None for no line."""
        del request, reply
        return None

    def read(self) -> list[Reply]:
        """The replies of an earlier run; lines that a kill cut short are skipped, so they are asked again."""
        if not self.path.is_file():
            return []
        replies = []
        for line in self.path.read_text("utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                replies.append(self.reply(json.loads(line)))
        return replies

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
        """What appends lines, all of them at once; a line torn by a kill is closed first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")

            def write(lines: Iterable[Mapping[str, Any]]) -> None:
                file.write("".join(encode(line) + "\n" for line in lines).encode())

            yield write


Progress = Callable[[Reply, bool], None]
"""Called with each reply, one after the other, and whether it was asked now rather than found in the journal."""


@dataclass(frozen=True)
class Client:
    """Where to ask and how patiently. Times in seconds; `pause` is the first one and doubles with each attempt."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 16
    timeout: float = 120.0
    attempts: int = 4
    pause: float = 0.5

    @property
    def root(self) -> str:
        """The address that ends in /v1, whichever form was given."""
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    def check_model(self, model: str) -> dict[str, Any]:
        """What the endpoint says of a model, nothing where it lists none.

        Raises SuiteError when nothing answers at the URL, or it lists models and `model` is none of them.
        """
        listed = self.models()
        if listed and model not in listed:
            raise SuiteError(f"{self.root} serves no model '{model}'", hint=near(model, listed))
        return listed.get(model, {})

    def models(self) -> dict[str, dict[str, Any]]:
        """What the endpoint says of each of its models, by name; empty for one that lists none.

        Raises SuiteError when nothing answers at the URL, or the API key is refused.
        """
        return uvloop.run(self._models())

    async def _models(self) -> dict[str, dict[str, Any]]:
        async with self.session() as session, self._answers(session.get(f"{self.root}/models")) as response:
            body = await response.text()
        if response.status in (401, 403):
            raise SuiteError(
                f"{self.root} refuses the API key (HTTP {response.status})",
                hint="name a variable with the right one: --api-key-env NAME",
            )
        try:
            return {str(model["id"]): model for model in json.loads(body)["data"]}
        except (ValueError, KeyError, TypeError):
            return {}  # listing models is optional; a wrong name shows in the first reply

    @contextlib.asynccontextmanager
    async def _answers(self, request: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a request; raises SuiteError where there is none."""
        try:
            async with request as response:
                yield response
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise SuiteError(f"'{self.url}' is no address", hint="e.g. http://127.0.0.1:8000") from None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            hint = "is the server running? e.g. suite serve --model DIR"
            raise SuiteError(f"no answer from {self.root}: {error or type(error).__name__}", hint=hint) from None

    async def stream(self, session: aiohttp.ClientSession, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a chat completion as they come; raises SuiteError with what the endpoint says is wrong."""
        asked = session.post(f"{self.root}/chat/completions", json={**body, "stream": True})
        async with self._answers(asked) as response:
            if response.status >= 400:
                raise SuiteError(http_error(response.status, await response.read()))
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(content := line.removeprefix(b"data: "))
                    if "error" in event:
                        raise SuiteError(f"the answer breaks off: {_message(content)}")
                    yield event

    def ask(self, requests: Iterable[Request], journal: Journal, progress: Progress | None = None) -> dict[str, Reply]:
        """All replies by request id. Answers in `journal` to the same requests are used; failures are asked again."""
        wanted = list(requests)
        kept = {reply.digest: reply for reply in journal.read() if not reply.error}
        replies = {r.id: replace(kept[r.digest], id=r.id) for r in wanted if r.digest in kept} if kept else {}
        for reply in replies.values():
            if progress:
                progress(reply, False)
        with journal.writing() as write:

            def follow(arrived: list[tuple[Request, Reply]]) -> None:
                lines = []
                for request, reply in arrived:
                    lines.append(journal.after(request, reply))
                    if progress:
                        progress(reply, True)
                write(filter(None, lines))

            with aside(follow) as later:

                def keep(request: Request, reply: Reply) -> None:
                    write([journal.line(request, reply)])
                    later((request, reply))

                run = _Run(self, iter([r for r in wanted if r.id not in replies]), keep, replies)
                uvloop.run(run.all())
        return replies

    def session(self) -> aiohttp.ClientSession:
        """Connections for `stream`, to be closed by the caller."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        # aiohttp because a shared httpx client spends 9 ms on a request at 64 at a time, where aiohttp spends 0.2
        connector = aiohttp.TCPConnector(limit=self.concurrency)
        return aiohttp.ClientSession(
            connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=self.timeout), read_bufsize=2**20,
            cookie_jar=aiohttp.DummyCookieJar(),
        )  # fmt: skip


@dataclass
class _Run:
    """The state that the workers of one `ask` share."""

    client: Client
    requests: Iterator[Request]
    keep: Callable[[Request, Reply], None]
    replies: dict[str, Reply]
    lost: int = 0  # requests in a row that the endpoint did not answer

    async def all(self) -> None:
        async with self.client.session() as session:
            await asyncio.gather(*(self.worker(session) for _ in range(self.client.concurrency)))

    async def worker(self, session: aiohttp.ClientSession) -> None:
        for request in self.requests:
            if self.lost >= max(FEWEST_LOST, self.client.concurrency):
                reply = Reply(request.id, request.digest, attempts=0, error="not asked: the endpoint does not answer")
            else:
                reply = await self.one(session, request)
            self.replies[request.id] = reply
            self.keep(request, reply)

    async def one(self, session: aiohttp.ClientSession, request: Request) -> Reply:
        """One request until it is answered, or given up."""
        url = f"{self.client.root}/{request.path}"
        attempt, error = 0, ""
        for attempt in range(1, self.client.attempts + 1):
            began, wait = time.perf_counter(), self.client.pause * 2 ** (attempt - 1)
            try:
                async with session.post(url, data=request.content) as response:
                    content = await response.read()
            except TimeoutError:
                error = f"no answer within {self.client.timeout:g} s"
                break
            except aiohttp.ClientError as failure:  # whose own text would have the port
                error = f"no connection ({type(failure).__name__})"
            else:
                self.lost = 0
                if response.status not in AGAIN:
                    return parse(request, response.status, content, attempt, time.perf_counter() - began)
                error = http_error(response.status, content)
                wait = max(wait, _seconds(response.headers.get("Retry-After")))
            if attempt < self.client.attempts:
                await asyncio.sleep(min(wait, LONGEST_PAUSE))
        self.lost += not error.startswith("HTTP")
        return Reply(request.id, request.digest, attempts=attempt, error=error)


def parse(request: Request, status: int, content: bytes, attempts: int = 1, latency: float = 0.0) -> Reply:
    """The reply in the body of an answer; one with an error where the body is not what the OpenAI API promises."""
    reply = partial(Reply, request.id, request.digest, attempts=attempts, latency=latency)
    if status >= 400:
        return reply(error=http_error(status, content), refused=status != 408)
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = said(choice["message"]) if "message" in choice else choice["text"]
        usage = body.get("usage") or {}
        finish, tokens = choice.get("finish_reason") or "", int(usage.get("completion_tokens") or 0)
        if not isinstance(text, str | None):
            raise TypeError("content is no text")
    except (ValueError, LookupError, TypeError, AttributeError):
        return reply(error=f"not an OpenAI reply: {_excerpt(content)}")
    if not request.body.get("echo"):
        return reply(_clean(text or ""), str(finish), tokens)
    try:
        logprobs = _prompt_logprobs(choice, usage, text or "", str(request.body["prompt"]))
    except (LookupError, TypeError, ValueError) as error:
        return reply(error=f"no log-probabilities of the prompt: {error}", refused=True)
    return reply(logprobs=logprobs)


def said(message: Mapping[str, Any]) -> str | None:
    """What an assistant's message says: its text, and below that each tool call as a line of JSON.

    >>> said({"content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"b": 1, "a": 2}'}}]})
    '{"arguments": {"a": 2, "b": 1}, "name": "add"}'
    """
    if not message.get("tool_calls"):
        content: str | None = message["content"]
        return content
    lines = [message.get("content")]
    for function in (call["function"] for call in message["tool_calls"]):
        arguments = function["arguments"]
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        call = {"name": function["name"], "arguments": arguments}
        lines.append(json.dumps(call, sort_keys=True, ensure_ascii=False))
    return "\n".join(filter(None, lines))


def _prompt_logprobs(choice: Any, usage: Any, text: str, prompt: str) -> tuple[float, ...]:
    """Natural-log probabilities of the prompt's second and later tokens."""
    if not text.strip().startswith(prompt.strip()):
        raise ValueError("the endpoint does not echo the prompt")
    given = (choice.get("logprobs") or {}).get("token_logprobs") or []
    # an endpoint that knows no max_tokens = 0 adds tokens of its own
    of_prompt = given[1 : usage.get("prompt_tokens") or len(given)]
    if not of_prompt or not all(isinstance(p, int | float) and math.isfinite(p) for p in of_prompt):
        raise ValueError("token_logprobs has no number for each token")
    return tuple(float(p) for p in of_prompt)


def http_error(status: int, content: bytes) -> str:
    """`HTTP 400: message`, with the message of OpenAI's error form, nested or flat, where there is one."""
    return f"HTTP {status}: {_message(content)}"


def _message(content: bytes) -> str:
    try:
        body = json.loads(content)
        inner = body.get("error", body)
        message = inner if isinstance(inner, str) else inner["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = _excerpt(content)
    return _clean(str(message))


def _clean(text: str) -> str:
    """`text` with a "?" for half of a surrogate pair, which JSON may hold and a file may not."""
    return text.encode("utf-8", "replace").decode()


def _excerpt(content: bytes) -> str:
    text = " ".join(content.decode("utf-8", "replace").split())
    return text[:200] or "(empty)"


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdigit() else 0.0
