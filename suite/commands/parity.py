"""`suite parity`: how far two models are from each other, by hand."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite import store
from suite.commands import named
from suite.commands.flags import Parser
from suite.config import Takes
from suite.errors import GateFailed, SuiteError
from suite.pipeline import on_command_line
from suite.progress import PlainView, RichView
from suite.stages import Artifact

KINDS = Takes("model", "quantized", "adapter", "package")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Side:
    """One of the two: a model's folder with perhaps an adapter's on top, or a GGUF file."""

    name: str
    path: Path
    adapter: Path | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether llama.cpp answers, and not transformers."""
        return self.path.suffix == ".gguf"

    @property
    def tokenizer(self) -> Path | None:
        """The folder whose tokenizer it reads with."""
        if self.adapter and any((self.adapter / name).is_file() for name in TOKENIZER):
            return self.adapter
        return None if self.is_gguf else self.path


def command(verb: str, arguments: list[str]) -> int:
    """Compare, print a table; exit code 3 when a limit that was given is missed."""
    parser = Parser(f"suite {verb}", "Compare two models on fixed probes: how far CHILD answers from PARENT.")
    what = "a model, quantized model, adapter or package (folder, @stage, or an artifact's key), or a .gguf file"
    parser.add_argument("parent", help=what)
    parser.add_argument("child", help="the same")
    parser.add_argument("--base", help="the model that an adapter belongs to [what its training recorded]")
    parser.add_argument("--max-kl", type=float, help="exit with 3 when the mean KL is larger, in nats a token")
    parser.add_argument(
        "--min-top1", type=float, help="exit with 3 when the same token is preferred less often, e.g. 0.99"
    )
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    given = parser.read(arguments)
    parent, child = (_side(text, given.base) for text in (given.parent, given.child))
    for side in (parent, child):
        _check(side)
    if parent.is_gguf and child.is_gguf:
        raise SuiteError("two GGUF files have no tokenizer here", hint="compare each with the model it was made from")
    found = _compare(parent, child, given.json)
    if given.json:
        print(json.dumps({k: None if _is_no_number(v) else v for k, v in found.items()}, ensure_ascii=False))
    else:
        _show(parent, child, found)
    if given.max_kl is not None or given.min_top1 is not None:
        _require(found, given.max_kl, given.min_top1)
    return 0


def _side(text: str, base: str | None) -> Side:
    """What the person named."""
    if Path(text).suffix == ".gguf" and Path(text).is_file():
        return Side(text, Path(text))
    artifact = _artifact(text)
    path = artifact.path
    if (path / "adapter_config.json").is_file():
        return Side(text, _base(artifact, base), path)
    files = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file() and len(files) == 1:
        return Side(text, files[0])
    return Side(text, path)


def _artifact(text: str) -> Artifact:
    found = on_command_line(text, KINDS, Path.cwd())
    if not isinstance(found, SuiteError):
        return found.artifact
    kept = store.Store(store.home()).find(text)
    if len(kept) > 1:
        raise SuiteError(f"'{text}' begins the keys of {len(kept)} artifacts", hint="give more of the key")
    if not kept:
        raise found
    return kept[0]


def _base(adapter: Artifact, base: str | None) -> Path:
    found = named.artifact(base, "--base", "model", "quantized") if base else named.base_of(adapter, "--base")
    return found.path


def _check(side: Side) -> None:
    """Find what is missing before torch is imported."""
    from export.folder import read_config
    from export.gguf import llamacpp
    from export.merge import plan
    from export.tensors import read_checkpoint
    from suite import quantized

    if side.is_gguf:
        if not llamacpp.installed():
            raise SuiteError("only llama.cpp reads GGUF files", where=side.name, hint=llamacpp.HINT)
        return
    read_config(side.path)
    if quantized.settings(side.path):
        return
    if side.adapter:
        plan(side.path, [side.adapter])
    else:
        read_checkpoint(side.path)


def _compare(parent: Side, child: Side, as_json: bool) -> dict[str, Any]:
    with contextlib.ExitStack() as open_files, _quiet(), _progress(as_json) as progress:
        from transformers.utils.logging import disable_progress_bar

        from export import parity

        disable_progress_bar()
        if parent.tokenizer and child.tokenizer:
            probes = parity.probes(child.tokenizer, parent=parent.tokenizer)
        else:
            probes = parity.probes(parent.tokenizer or child.tokenizer or parent.path)
        return parity.measure(_opener(parent, open_files), _opener(child, open_files), probes, progress)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries tell what they lack for machines other than this, and one prints its logo."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)


def _opener(side: Side, open_files: contextlib.ExitStack) -> Callable[[], Any]:
    from export import parity
    from export.gguf.llamacpp import LlamaCpp
    from suite import quantized

    if side.is_gguf:
        return lambda: open_files.enter_context(LlamaCpp(side.path))
    if quantized.settings(side.path):
        return lambda: parity.load(side.path, side.adapter, dtype="auto")
    return lambda: parity.load(side.path, side.adapter)


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[float, float, str], None]]:
    if as_json:
        yield lambda *_: None
        return
    with RichView(Console(stderr=True), 6) if sys.stderr.isatty() else contextlib.nullcontext(PlainView()) as view:
        yield lambda step, total, what: view.event(
            "parity", {"event": "progress", "step": step, "total": total, "what": what, "values": {}}
        )


def _show(parent: Side, child: Side, found: dict[str, Any]) -> None:
    prompts = f"{found['prompts']:.1%}" if "prompts" in found else "not compared"
    if "other_prompt" in found:
        prompts += f"; other tokens for {found['other_prompt']!r}"
    rows = {
        "KL, nats a token": f"{found['kl']:.2g}",
        "same preferred token": f"{found['top1']:.2%} of {found['positions']} positions; {found['ties']:.2%} as good",
        "greedy answers": f"{found['greedy']:.1%} the same, {found['greedy_tokens']:.1f} tokens of each; "
        f"{found['greedy_equal']:.0%} are equal, up to a token that is as good",
        "perplexity, parent and child": f"{found['ppl_parent']:.4g}, {found['ppl_child']:.4g}",
        "logit difference, max and mean": f"{found['max_dlogit']:.2g}, {found['mean_dlogit']:.2g}",
        "same prompt tokens": prompts,
        "vocabulary, parent and child": _vocabulary(found["vocabulary_parent"], found["vocabulary_child"]),
        "worst probe": f"KL {found['worst_kl']:.2g}: {found['worst_probe']!r}",
    }
    table = Table(f"{child.name} against {parent.name}", "", box=box.SIMPLE_HEAD)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console().print(table)


def _vocabulary(parent: int, child: int) -> str:
    return f"{parent}, {child}" + (f"; the first {min(parent, child)} are compared" if parent != child else "")


def _require(found: dict[str, Any], max_kl: float | None, min_top1: float | None) -> None:
    from export.limits import Limits
    from export.parity import require

    try:
        require(found, Limits(kl=math.inf if max_kl is None else max_kl, top1=min_top1 or 0.0))
    except SuiteError as error:
        raise GateFailed(error.message, hint=error.hint) from None


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
