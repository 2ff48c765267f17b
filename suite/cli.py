"""The `suite` command: verbs here, everything heavy behind them."""

from __future__ import annotations

import errno
import importlib
import os
import sys

USAGE = "usage: suite VERB ...   (suite VERB --help says more)"

# verb: (what it does, where it lives)
VERBS = {
    "run": ("run a pipeline file; what is made already is not made again", "suite.commands.pipelines:run"),
    "plan": ("check a pipeline file and show what a run would do", "suite.commands.pipelines:plan"),
    "runs": ("list runs", "suite.commands.show:runs"),
    "show": ("a run's report, or an artifact and where it came from", "suite.commands.show:show"),
    "train": ("tune a model: a LoRA adapter or all weights", "suite.commands.stage:command"),
    "merge": ("fold an adapter into its base", "suite.commands.stage:command"),
    "quantize": ("make a model smaller with GPTQ, AWQ or bitsandbytes", "suite.commands.stage:command"),
    "export": ("make a Hugging Face folder or an Ollama package", "suite.commands.stage:command"),
    "download": ("fetch a model or an adapter from a model hub", "suite.commands.stage:command"),
    "push": ("upload a package to a model hub", "suite.commands.stage:command"),
    "eval": ("score an artifact, or any OpenAI endpoint (--url)", "suite.commands.evaluate:command"),
    "compare": ("put what was evaluated side by side: better, worse, or cannot tell", "suite.commands.compare:command"),
    "predict": (
        "answer every row of a data file, resumably; metrics against its labels",
        "suite.commands.predict:command",
    ),
    "parity": ("compare two models: logits, preferred tokens, answers", "suite.commands.parity:command"),
    "pretrain": ("train a small model and its tokenizer from nothing", "suite.commands.stage:command"),
    "serve": ("serve a model and its adapters over HTTP", "suite.commands.serve:command"),
    "chat": ("talk to an endpoint", "suite.commands.chat:command"),
    "bench-serve": ("measure an endpoint under load, and what load it bears", "suite.commands.bench_serve:command"),
    "env": (
        "install what lives apart: vLLM, LMDeploy, llm-compressor, EvalScope, lmeval",
        "suite.commands.env:command",
    ),
    "doctor": ("check this machine and what each part needs", "suite.commands.doctor:command"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 a stage failed, 2 wrong input, 3 a gate failed, 130 stopped)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if arguments[0] in ("-V", "--version"):
        from suite import __version__

        print(f"suite {__version__}")
        return 0
    return dispatch(arguments[0], arguments[1:])


def help_text() -> str:
    """What `suite --help` prints."""
    lines = [f"  {verb:13}{text}" for verb, (text, _) in VERBS.items()]
    start = "start with: suite run examples/quickstart.toml"
    return "\n".join([USAGE, "", *lines, "", start])


def dispatch(verb: str, arguments: list[str]) -> int:
    """Run one verb; mistakes of the user become one message on stderr, never a traceback."""
    from suite.errors import SuiteError, near

    try:
        if verb not in VERBS:
            raise SuiteError(f"unknown command '{verb}'", hint=near(verb, VERBS))
        module, _, function = VERBS[verb][1].partition(":")
        return int(getattr(importlib.import_module(module), function)(verb, arguments))
    except SuiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `suite show | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        from suite.store import disk_error, home

        print(f"error: {disk_error(error, home())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
