"""A real model that was made bad on purpose is stopped by a gate; one that nothing was done to cannot be told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from suite.cli import main
from suite.references import nano

NONSENSE = [
    {"messages": [{"role": "user", "content": "7" * n}, {"role": "assistant", "content": "7 7 7"}]} for n in range(1, 9)
]
PIPELINE = """
name = "deciding"

[defaults.eval]
sets = ["ceval-mini"]

[stage.before]
use = "eval"
model = "nano"

[stage.crushed]                     # 2 bits, one scale a row, calibrated with nonsense, and no limit of its own
use = "quantize"
model = "nano"
method = "gptq"
bits = 2
group_size = -1
max_kl = 1000.0
calibration = "nonsense.jsonl"

[stage.bad]
use = "eval"
model = "@crushed"
gate = [
  "bytes < 0.9 * @before.bytes",
  "ceval-mini.acc >= @before.ceval-mini.acc - 0.05 at 95 %",
  "forgotten(@before.ceval-mini) <= 2",
]

[stage.shipped]
use = "export"
to = "hf"
model = "nano"
needs = ["@bad"]

[stage.untouched]
use = "eval"
model = "untouched"
gate = ["ceval-mini.acc >= @before.ceval-mini.acc - 0.05 at 95 %", "forgotten(@before.ceval-mini) == 0"]
"""


def test_a_gate_stops_two_bits_and_lets_nothing_pass(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deciding.toml").write_text(PIPELINE, "utf-8")
    (tmp_path / "nonsense.jsonl").write_text("\n".join(map(json.dumps, NONSENSE)), "utf-8")
    shutil.copytree(nano(), tmp_path / "untouched")
    (tmp_path / "untouched" / "README.md").write_text("The same weights in another folder.", "utf-8")
    for state in ("done", "cached"):
        assert main(["run", str(tmp_path / "deciding.toml"), "--json"]) == 3
        shown = capfd.readouterr()
        assert "gate 'ceval-mini.acc >= @before.ceval-mini.acc - 0.05 at 95 %' does not hold" in shown.err
        (run_dir,) = [json.loads(line)["run"] for line in shown.out.splitlines() if '"end"' in line]
        report = json.loads((Path(run_dir) / "report.json").read_text("utf-8"))
        stages = {stage["name"]: stage for stage in report["stages"]}
        assert {name: stages[name]["state"] for name in ("bad", "shipped", "untouched")} == {
            "bad": state, "shipped": "blocked", "untouched": state,
        }  # fmt: skip
        assert [gate["held"] for gate in stages["bad"]["gates"]] == [True, False, False]
        assert [gate["held"] for gate in stages["untouched"]["gates"]] == [True, True]
        rows = {row["artifact"]: row for row in report["artifacts"]}
        assert rows["crushed"]["verdicts"] == {"ceval-mini": "worse"}
        assert len(rows["crushed"]["forgotten"]["ceval-mini"]) >= 10
    assert main(["compare", "@before", "@bad", "@untouched", "--json"]) == 0
    bad, untouched = json.loads(capfd.readouterr().out)["comparisons"]
    assert bad["sets"]["ceval-mini"]["verdict"] == "worse"
    same = untouched["sets"]["ceval-mini"]
    assert (same["verdict"], same["difference"], same["gained"], same["lost"]) == ("cannot tell", 0, [], [])
