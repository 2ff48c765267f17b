"""Run by the interpreter of the environment `lmeval`, as `python lmeval_script.py JOB.json`.

It imports nothing of the suite, and the suite does not import it. The API key is in the environment variable
OPENAI_API_KEY. JOB.json:

    task, include                  a task's name, and a folder with more tasks or null
    url, model                     the endpoint, down to /v1, and the name to ask for
    limit, shots, system           as lm-evaluation-harness has them; null leaves them to the task
    max_tokens, temperature, seed, stop
    concurrency, attempts, pause, timeout
    out                            where the result goes

Tasks, prompts, filters and metrics are those of lm-evaluation-harness; the requests are sent here, because its own
clients end a run with the first question that fails and do not say where a reply was cut. A continuation's likelihood
is that of its tokens in context + continuation, those after as many tokens as the context alone has, which is how
lm-evaluation-harness does it; the endpoint counts them, so no tokenizer is needed.

Each answer is appended to `answers.jsonl` beside JOB.json as it comes; those that lie there are not asked for again.
Prints a line `{"step": ..., "total": ..., "what": ...}` for each request that is done. The result has "results" and
"samples" as lm-evaluation-harness gives them, and "replies": by task and document what came back, or why nothing did.
"""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

Kept = runpy.run_path(str(Path(__file__).with_name("kept.py")))["Kept"]


class Refused(Exception):
    """What an endpoint says in place of an answer."""


class Endpoint(LM):  # type: ignore[misc]
    """A model behind an OpenAI endpoint. A request that fails is an empty reply, or -inf, and noted in `replies`."""

    def __init__(self, job: dict[str, Any], kept: Any) -> None:
        super().__init__()
        self.job, self.kept = job, kept
        self.replies: dict[str, dict[str, Any]] = {}

    @property
    def tokenizer_name(self) -> str:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: ARG002
        """The messages themselves: the endpoint has the template."""
        return json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._all(requests, self._generate, "")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._all(requests, self._likelihood, (float("-inf"), False))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:  # noqa: ARG002
        raise ValueError("perplexity of documents is measured by the suite itself: use a set of the kind perplexity")

    def _all(self, requests: list[Instance], one: Callable[..., Awaitable[Any]], failed: Any) -> list[Any]:
        done = 0

        async def guarded(session: aiohttp.ClientSession, instance: Instance) -> Any:
            nonlocal done
            try:
                return await one(session, instance)
            except Refused as error:
                self._note(instance, error=str(error))
                return failed
            finally:
                done += 1
                line = {"step": done, "total": len(requests), "what": instance.task_name}
                print(json.dumps(line), flush=True)

        async def run() -> list[Any]:
            headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
            timeout = aiohttp.ClientTimeout(total=None, sock_read=self.job["timeout"])
            connector = aiohttp.TCPConnector(limit=self.job["concurrency"])
            async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
                return await asyncio.gather(*(guarded(session, instance) for instance in requests))

        return asyncio.run(run())

    def _note(self, instance: Instance, **what: Any) -> None:
        self.replies.setdefault(f"{instance.task_name}/{instance.doc_id}", {}).update(what)

    async def _generate(self, session: aiohttp.ClientSession, instance: Instance) -> str:
        context, wanted = instance.args
        until = wanted.get("until") or []
        stop = [*([until] if isinstance(until, str) else until), *self.job["stop"]]
        body = {
            "messages": json.loads(context), "max_tokens": wanted.get("max_gen_toks", self.job["max_tokens"]),
            "temperature": wanted.get("temperature", 0) if wanted.get("do_sample") else self.job["temperature"],
            "seed": self.job["seed"], **({"stop": stop[:4]} if stop else {}),
        }  # fmt: skip
        found = await self._post(session, "chat/completions", body)
        choice = found["choices"][0]
        tokens = (found.get("usage") or {}).get("completion_tokens") or 0
        self._note(instance, finish=choice.get("finish_reason") or "", tokens=tokens)
        return choice["message"].get("content") or ""

    async def _likelihood(self, session: aiohttp.ClientSession, instance: Instance) -> tuple[float, bool]:
        context, continuation = instance.args
        spaces = len(context) - len(context.rstrip())  # a space belongs to the word after it
        context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        before = await self._echo(session, context) if context else None
        whole = await self._echo(session, context + continuation)
        first = len(before["token_logprobs"]) if before else 1
        logprobs = whole["token_logprobs"][first:]
        best = [max(top.values()) for top in (whole.get("top_logprobs") or [])[first:] if top]
        if not logprobs or None in logprobs:
            raise Refused("no log-probabilities of the continuation")
        return sum(logprobs), len(best) == len(logprobs) and all(a >= b for a, b in zip(logprobs, best, strict=True))

    async def _echo(self, session: aiohttp.ClientSession, prompt: str) -> dict[str, Any]:
        """The log-probabilities of a text's tokens."""
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        found = await self._post(session, "completions", body)
        choice = found["choices"][0]
        if not choice.get("logprobs") or not choice["text"].startswith(prompt):
            raise Refused("the endpoint gives no log-probabilities of a prompt")
        return dict(choice["logprobs"])

    async def _post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the endpoint answers; asked again where it was not there, too busy or broken. Raises Refused."""
        if (known := self.kept.take([path, body])) is not None:
            return dict(known)
        answer = await self._answer(session, path, body)
        self.kept.add([path, body], answer)
        return answer

    async def _answer(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
        error = ""
        for attempt in range(self.job["attempts"]):
            if attempt:
                await asyncio.sleep(min(self.job["pause"] * 2 ** (attempt - 1), 30.0))
            try:
                async with session.post(f"{self.job['url']}/{path}", json={"model": self.job["model"], **body}) as got:
                    said = await got.text()
            except TimeoutError:
                raise Refused(f"no answer within {self.job['timeout']:g} s") from None
            except aiohttp.ClientError as failure:
                error = f"no connection ({type(failure).__name__})"
            else:
                if got.status == 200:
                    return _completion(said)
                error = f"HTTP {got.status}: {' '.join(said.split())[:200]}"
                if got.status != 429 and got.status < 500:
                    break
        raise Refused(error)


def _completion(said: str) -> dict[str, Any]:
    try:
        body = json.loads(said)
        choice = body["choices"][0]
        if "text" not in choice and "content" not in choice["message"]:
            raise KeyError("content")
    except (ValueError, LookupError, TypeError):
        raise Refused(f"not an OpenAI reply: {' '.join(said.split())[:200]}") from None
    return dict(body)


def main(file: Path) -> None:
    job = json.loads(file.read_text("utf-8"))
    manager = TaskManager(include_path=job["include"])
    kinds = {task.OUTPUT_TYPE == "generate_until" for task in manager.load([job["task"]])["tasks"].values()}
    if len(kinds) > 1:
        raise SystemExit(
            f"{job['task']} mixes tasks that generate and tasks that measure likelihoods: name one of them"
        )
    with Kept(file.with_name("answers.jsonl")) as kept:
        model = Endpoint(job, kept)
        found = simple_evaluate(
            model, tasks=[job["task"]], task_manager=manager, limit=job["limit"], num_fewshot=job["shots"],
            system_instruction=job["system"], apply_chat_template=kinds == {True}, log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    whole = {name: found[name] for name in ("results", "samples", "configs", "higher_is_better")}
    Path(job["out"]).write_text(
        json.dumps({**whole, "replies": model.replies}, default=str, ensure_ascii=False), "utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
