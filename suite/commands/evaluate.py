"""`suite eval`: score an artifact as a stage, or any OpenAI endpoint with --url."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from suite.commands import outputs, stage
from suite.commands.flags import Parser, key_in, pairs
from suite.config import Where, parse
from suite.errors import StageFailed, SuiteError


def command(verb: str, arguments: list[str]) -> int:
    """Without --url this is the `eval` stage, whose `model` may stand first; with it, the endpoint there is asked."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    if not any(a == "--url" or a.startswith("--url=") for a in arguments):
        if any(a in ("-h", "--help") for a in arguments):
            print(
                "suite eval MODEL evaluates an artifact, a GGUF file too.\n"
                "suite eval --url URL --model NAME [--sets A,B] asks any OpenAI endpoint: suite eval --url x --help\n"
            )
        return stage.command(verb, arguments)
    from evalsets.external.harness import Settings
    from suite.evaluate import Judge, evaluate_url

    given = _parser(verb).read(arguments)
    if (
        min(given.concurrency, given.limit or 1) < 1
        or min(given.max_failed, given.shots or 0) < 0
        or given.timeout <= 0
    ):
        raise SuiteError("--concurrency, --limit and --timeout must be more than 0, --max-failed and --shots not less")
    for file in given.leakage:
        if not file.is_file():
            raise SuiteError(f"--leakage: no file {file}", hint="name .json or .jsonl files that the model learnt from")
    outputs.check(given)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        metrics = evaluate_url(
            given.url,
            given.model,
            [name for name in given.sets.split(",") if name],
            out=folder,
            concurrency=given.concurrency,
            shots=given.shots,
            fetched=_fetched(given.sets.split(",")),
            limit=given.limit,
            api_key=key_in(given.api_key_env),
            timeout=given.timeout,
            external=parse(Settings, pairs("--external", given.external), Where()),
            learnt=given.leakage,
            judge=parse(Judge, pairs("--judge", given.judge), Where()) if given.judge else None,
            show=not given.json,
        )
        outputs.deliver(given, folder, f"{given.model} at {given.url}", metrics)
    if given.json:
        print(json.dumps(metrics, ensure_ascii=False))
    if (failed := _failed(metrics)) > given.max_failed:
        where = f"{given.out}/report.md says why" if given.out else "--out FOLDER keeps what came back"
        raise StageFailed(f"{failed} questions failed", hint=f"{where}; the same command asks only them again")
    return 0


def _fetched(sets: list[str]) -> dict[str, Path]:
    """The folders of the sets whose data is at hubs, by address, downloaded where they are not here."""
    from evalsets.sets import at_hub
    from suite.commands.named import artifact

    with contextlib.redirect_stdout(sys.stderr):
        return {address: artifact(address, "--sets", "data").path for address in filter(None, map(at_hub, sets))}


def _failed(metrics: dict[str, Any]) -> int:
    return sum(found.get("failed", 0) for found in metrics.values() if isinstance(found, dict))


def _parser(verb: str) -> Parser:
    from suite.evaluate import DEFAULT_SETS

    parser = Parser(f"suite {verb}", "Score a model behind any OpenAI endpoint.")
    flag = parser.add_argument
    flag("--url", required=True, help="the endpoint, e.g. http://127.0.0.1:8000")
    flag("--model", required=True, help="the name to ask for")
    flag(
        "--sets", default=",".join(DEFAULT_SETS),
        help=f"shipped sets, folders, hf:org/name, evalscope:NAME, lmeval:TASK [{','.join(DEFAULT_SETS)}]",
    )  # fmt: skip
    flag("--out", type=Path, help="folder for answers and report; a second run there asks only what is missing")
    flag("--concurrency", type=int, default=16, help="requests at the same time [16]")
    flag("--timeout", type=float, default=120.0, help="seconds after which a question counts as failed [120]")
    flag("--shots", type=int, help="solved examples before each question, where a set has them")
    flag("--limit", type=int, help="questions a set, for a quick look")
    flag("--max-failed", type=int, default=0, help="questions that may fail before the exit code is 1 [0]")
    flag(
        "--external", action="append", default=[], metavar="KEY=VALUE",
        help="how sets of other programs are asked: max_tokens, temperature, seed, stop, args",
    )  # fmt: skip
    flag(
        "--judge", action="append", default=[], metavar="KEY=VALUE",
        help="who grades replies, where a set wants it: url, model, api_key_env",
    )  # fmt: skip
    flag(
        "--leakage", action="extend", nargs="+", type=Path, default=[], metavar="FILE",
        help="what the model was trained on (.json, .jsonl): questions that stand there are counted",
    )  # fmt: skip
    flag("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    flag("--json", action="store_true", help="JSON on stdout, for machines")
    outputs.add(parser)
    return parser
