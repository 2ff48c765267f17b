"""How each kind of set is scored: a row for a question, and the figures of rows.

choice.py        letters, generated and likeliest
numeric.py       numbers
texts.py         references, by the metrics that the set names
tools.py         calls of tools, and steps of ToolBench
verified.py      instructions and refusals
perplexity.py    texts to predict
kind.py          what they share
"""

from evalsets.kinds import choice, numeric, perplexity, texts, tools, verified
from evalsets.kinds.kind import Kind, Replies, Row
from evalsets.sets.settings import Kind as Name

KINDS: dict[Name, Kind] = {
    "choice": choice.KIND, "numeric": numeric.KIND, "qa": texts.KIND, "tools": tools.CALLS, "toolbench": tools.STEPS,
    "instructions": verified.INSTRUCTIONS, "refusals": verified.REFUSALS, "perplexity": perplexity.KIND,
}  # fmt: skip

__all__ = ["KINDS", "Kind", "Replies", "Row"]
