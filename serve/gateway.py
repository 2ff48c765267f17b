"""OpenAI's routes: prompts are rendered to token ids, an engine generates, answers take OpenAI's shapes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve import forms
from serve.answers import Answer, Bridge, Engine, Group
from serve.catalog import Catalog, Served
from serve.generation import Request as Prompt
from serve.generation import Sampling
from serve.middleware import ApiKeys, BodyLimit
from serve.protocol import ApiError, Body, ChatBody, CompletionBody
from serve.streams import EventStream, cancelled_when_gone, chat_events, completion_events
from serve.text import TextStream
from suite.errors import SuiteError

log = logging.getLogger("serve")

BODY_LIMIT = 16 * 2**20

Notify = Callable[[list[Any]], None]
StartEngine = Callable[[Notify], Engine]


@dataclass
class Server:
    """What the routes share. `engine` and `catalog` are None until loading is done; `problem` says why it failed."""

    engine: Engine | None = None
    catalog: Catalog | None = None
    bridge: Bridge | None = None
    problem: str = ""

    def ready(self) -> tuple[Engine, Catalog, Bridge]:
        """Raises ApiError 503 while requests cannot be answered."""
        if self.engine is None or self.catalog is None or self.bridge is None or not self.engine.alive:
            raise ApiError(503, self.problem or "the model is still loading", kind="server_error")
        return self.engine, self.catalog, self.bridge


def create_app(
    model: Path,
    adapters: Mapping[str, Path],
    name: str,
    start_engine: StartEngine,
    *,
    api_keys: Sequence[str] = (),
    body_limit: int = BODY_LIMIT,
    loaded: Callable[[SuiteError | None], None] = lambda _: None,
) -> FastAPI:
    """The application; the model is loaded in the background and `loaded` told how that went."""
    server = Server()

    async def load() -> None:
        loop = asyncio.get_running_loop()
        server.bridge = Bridge(loop)
        error = None
        try:
            server.catalog = await asyncio.to_thread(Catalog, model, adapters, name)
            server.engine = await asyncio.to_thread(start_engine, server.bridge.notify)
        except SuiteError as refused:
            error = refused
        except Exception as failed:
            log.exception("loading failed")
            error = SuiteError(f"the model cannot be loaded: {type(failed).__name__}: {failed}", where=str(model))
        server.problem = str(error) if error else ""
        loaded(error)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        yield
        await loading
        if server.engine is not None:
            await asyncio.to_thread(server.engine.close)

    app = FastAPI(title="suite", lifespan=lifespan)
    _add_errors(app)
    _add_routes(app, server)
    app.add_middleware(BodyLimit, limit=body_limit)
    if api_keys:
        app.add_middleware(ApiKeys, keys=api_keys)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            refused = ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
        else:
            what = first["msg"].removeprefix("Value error, ")
            refused = ApiError(400, f"{'.'.join(path)}: {what}" if path else what, param=path[0] if path else None)
        return JSONResponse(refused.body, refused.status)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # uvicorn logs it with its traceback
        failed = ApiError(500, f"the server failed: {type(error).__name__}", kind="server_error")
        return JSONResponse(failed.body, failed.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    @app.get("/ready")
    async def health() -> dict[str, Any]:
        """200 once requests are answered, with what the engine does at the moment."""
        engine = server.ready()[0]
        running, waiting = engine.load
        return {"status": "ready", "running": running, "waiting": waiting, "failed_steps": engine.failures}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return server.ready()[1].listing()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        catalog = server.ready()[1]
        return catalog.card(catalog.find(name).name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        engine, catalog, bridge = server.ready()
        parsed = bool(body.tools) and body.tool_choice != "none"
        context = bridge.open(engine, _chat_prompts(body, catalog.find(body.model), engine), body.stream)
        if body.stream:
            return EventStream(context, request, lambda group: chat_events(group, body, parsed))
        return await _answer(context, request, lambda answers: forms.chat_completion(body, answers, parsed))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        engine, catalog, bridge = server.ready()
        prompts, echoes = _completion_prompts(body, catalog.find(body.model), engine)
        context = bridge.open(engine, prompts, body.stream)
        if body.stream:
            return EventStream(context, request, lambda group: completion_events(group, body, echoes))
        return await _answer(context, request, lambda answers: forms.completion(body, answers, echoes))


def _chat_prompts(body: ChatBody, served: Served, engine: Engine) -> list[tuple[Prompt, TextStream]]:
    if served.chat is None:
        raise ApiError(400, f"'{body.model}' cannot chat: {served.no_chat}", param="model")
    messages = [message.plain() for message in body.messages]
    tools = body.tools if body.tool_choice != "none" else None
    try:
        ids = served.chat.ids(messages, tools, generate=True, **body.chat_template_kwargs)
    except (SuiteError, TypeError, ValueError) as error:
        raise ApiError(400, str(error), param="messages") from None
    top = (body.top_logprobs or 0) if body.logprobs else None
    hidden = served.hidden_beside_tools if tools else served.hidden
    prompt = partial(_prompt, body, served, ids, body.limit or engine.max_length, hidden, top)
    return [prompt(sample) for sample in range(body.n)]


def _completion_prompts(
    body: CompletionBody, served: Served, engine: Engine
) -> tuple[list[tuple[Prompt, TextStream]], list[str | None]]:
    """A request for each sample of each prompt, and the text that each echoes."""
    prompts: list[tuple[Prompt, TextStream]] = []
    echoes: list[str | None] = []
    limit = engine.max_length if body.max_tokens is None else body.max_tokens
    for given in body.prompts:
        try:
            ids = given if isinstance(given, list) else list(served.tokenizer(given)["input_ids"])
            text = served.tokenizer.decode(given) if isinstance(given, list) else given
        except (TypeError, ValueError) as error:  # half a surrogate pair is a string in JSON, and no text
            raise ApiError(400, f"the prompt cannot be tokenised: {error}", param="prompt") from None
        prompt = partial(_prompt, body, served, ids, limit, served.hidden, body.logprobs)
        prompts += [prompt(sample, body.logprobs if body.echo else None) for sample in range(body.n)]
        echoes += [text if body.echo else None] * body.n
    return prompts, echoes


def _prompt(
    body: Body,
    served: Served,
    ids: list[int],
    limit: int,
    hidden: frozenset[int],
    logprobs: int | None,
    sample: int,
    prompt_logprobs: int | None = None,
) -> tuple[Prompt, TextStream]:
    """The request for sample number `sample` of a body, and where its text will gather."""
    given = {key: getattr(body, key) for key in served.sampling if getattr(body, key) is not None}
    # the samples of one seed differ from each other, and are the same every time
    seed = None if body.seed is None else body.seed + sample
    prompt = Prompt(
        prompt=ids,
        adapter=served.adapter,
        max_tokens=limit,
        sampling=Sampling(**{**served.sampling, **given}, seed=seed),
        stop_ids=frozenset() if body.ignore_eos else served.stops,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return prompt, TextStream(served.tokenizer, body.stops, hidden)


async def _answer(
    context: contextlib.AbstractContextManager[Group], request: Request, form: Callable[[list[Answer]], dict[str, Any]]
) -> Response:
    with context as group:
        async with cancelled_when_gone(request, group):
            return JSONResponse(form(await group.wait()))
