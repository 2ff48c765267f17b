"""Files of evaluation sets, written as hubs and other tools keep them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

CEVAL = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]


def table(path: Path, *rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)


def lines(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def parquet(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def ceval(folder: Path) -> Path:
    for subject in ("law", "logic", "physician"):
        table(folder / f"val/{subject}_val.csv", CEVAL, ["0", f"{subject}是什么？", "1.10", "NA", "c", "d", "B", ""])
        table(folder / f"test/{subject}_test.csv", CEVAL[:6], ["0", "？", "a", "b", "c", "d"])
        dev = ([str(i), f"例{i}", "a", "b", "c", "d", "ABCDA"[i], "因为"] for i in range(5))
        table(folder / f"dev/{subject}_dev.csv", CEVAL, *dev)
    return folder
