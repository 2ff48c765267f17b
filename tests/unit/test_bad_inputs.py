"""What a person gets wrong with real stages: one message each, exit code 2, before anything runs and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROW = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})

CASES = {
    "missing data file": (
        {},
        '[stage.train]\nbase = "nano"\ndata = "no.jsonl"\n',
        "pipeline.toml:3: data: no such file or folder: no.jsonl",
    ),
    "malformed JSON line": (
        {"d.jsonl": ROW + '\n{"messages": [{"role": "user" "content": "x"}]}\n'},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\n',
        "d.jsonl:2:",
    ),
    "unknown key": (
        {"d.jsonl": ROW},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\nlora.rnak = 8\n',
        "pipeline.toml:4: unknown key 'rnak'\n  hint: did you mean 'rank'?",
    ),
    "unknown key for the library": (
        {"d.jsonl": ROW},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\nextra = { weight_dacay = 0.1 }\n',
        "weight_decay",
    ),
    "wrong reference type": (
        {"d.jsonl": ROW},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\n[stage.quantize]\nmethod = "bnb"\nmodel = "@train"\n',
        "pipeline.toml:6: 'model' takes a model, but '@train' makes an adapter",
    ),
    "unknown backend": (
        {},
        '[stage.eval]\nmodel = "nano"\nbackend = "vlm"\n',
        "pipeline.toml:3: backend: unknown backend 'vlm'",
    ),
    "unknown set": ({}, '[stage.eval]\nmodel = "nano"\nsets = ["ceval-mni"]\n', "ceval-mini"),
    "base without config.json": (
        {"base/model.safetensors": "", "d.jsonl": ROW},
        '[stage.train]\nbase = "base"\ndata = "d.jsonl"\n',
        "pipeline.toml:2: base: base: this folder has no config.json",
    ),
    "bits that a method has not": (
        {"d.jsonl": ROW},
        '[stage.quantize]\nmodel = "nano"\nmethod = "awq"\nbits = 8\ncalibration = "d.jsonl"\n',
        "pipeline.toml:4: bits: ",
    ),
    "no calibration": ({}, '[stage.quantize]\nmodel = "nano"\n', "calibration"),
    "placeholder without value": (
        {"d.jsonl": ROW.replace("ho", "I am {{name}}")},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\n',
        "{{name}}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_said_before_anything_runs(case: str, tmp_path: Path) -> None:
    files, pipeline, said = CASES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "pipeline.toml").write_text(pipeline, "utf-8")
    script = (
        "import sys\nfrom suite.cli import main\n"
        f"code = main(['run', {str(tmp_path / 'pipeline.toml')!r}])\n"
        "print('torch' in sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["False"]
