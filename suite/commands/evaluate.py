"""`suite eval`: score an artifact as a stage, or any OpenAI endpoint with --url."""

from __future__ import annotations

import json
from pathlib import Path

from suite.commands import stage
from suite.commands.flags import Parser, key_in


def command(verb: str, arguments: list[str]) -> int:
    """Without --url this is the `eval` stage; with it, the endpoint there is asked."""
    if not any(a == "--url" or a.startswith("--url=") for a in arguments):
        if any(a in ("-h", "--help") for a in arguments):
            print(
                "suite eval --url URL --model NAME [--sets A,B] asks any OpenAI endpoint: suite eval --url x --help\n"
            )
        return stage.command(verb, arguments)
    from suite.evaluate import DEFAULT_SETS, evaluate_url

    parser = Parser(f"suite {verb}", "Score a model behind any OpenAI endpoint.")
    parser.add_argument("--url", required=True, help="the endpoint, e.g. http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the name to ask for")
    parser.add_argument("--sets", default=",".join(DEFAULT_SETS), help=f"evaluation sets [{','.join(DEFAULT_SETS)}]")
    parser.add_argument(
        "--out", type=Path, help="folder for answers and report; a second run there asks only what is missing"
    )
    parser.add_argument("--concurrency", type=int, default=16, help="requests at the same time [16]")
    parser.add_argument("--limit", type=int, help="questions a set, for a quick look")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    given = parser.read(arguments)
    sets = [s for s in given.sets.split(",") if s]
    scores = evaluate_url(
        given.url,
        given.model,
        sets,
        out=given.out,
        concurrency=given.concurrency,
        limit=given.limit,
        api_key=key_in(given.api_key_env),
        show=not given.json,
    )
    if given.json:
        print(json.dumps(scores, ensure_ascii=False))
    return 0
