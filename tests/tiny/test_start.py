"""What a start leaves out is left out, and is there when somebody asks for it: each in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = """
import importlib.metadata, sys
from pathlib import Path
from serve.preload import Distributions, Uncompiled, libraries, preload
model = Path("examples/nano/model")
preload(model)
libraries(model)
"""


def run(script: str, home: Path, begin: str = BEGIN) -> None:
    environment = {"PYTHONPATH": str(ROOT), "SUITE_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", begin + script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_an_answer_needs_nothing_of_what_is_left_out(tmp_path: Path) -> None:
    run(
        """
from serve.generation import Request
from serve.settings import Settings
from suite.chat import Chat
chat = Chat.load(model)
engine = Settings(model=model).start_engine(lambda _: None)
generation = engine.submit(Request(prompt=chat.ids([{"role": "user", "content": "Hi"}]), max_tokens=4)).wait(100)
engine.close()
assert len(generation.new) == 4, generation.error
assert type(sys.modules["torch._dynamo"]) is Uncompiled, "something has called torch's compiler"
heavy = ("torch._dynamo.utils", "torch._inductor", "torch.distributed.tensor", "triton", "accelerate", "PIL", "rich")
there = [name for name in heavy if sys.modules.get(name) is not None]
assert not there, there
names = list(Path(__import__("os").environ["SUITE_HOME"], "structures").iterdir())
assert len(names) == 1, names
""",
        tmp_path,
    )


def test_what_is_asked_for_is_there(tmp_path: Path) -> None:
    run(
        """
import torch, transformers
assert Path(transformers.__file__).parent.name == "transformers"
assert transformers.BertModel.__module__ == "transformers.models.bert.modeling_bert"
assert transformers.utils.import_utils.is_torch_available()

torch.compiler.reset()
assert type(torch._dynamo) is not Uncompiled
assert torch._dynamo.explain and torch._dynamo.disable.__module__ == "torch._dynamo.decorators"
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert torch.distributed.is_available()

real = importlib.metadata.packages_distributions()
for package in ("torch", "yaml", "safetensors", "no_such_package"):
    found = [name.lower() for name in Distributions().get(package, [])]
    assert found == [name.lower() for name in dict.fromkeys(real.get(package, []))], package
""",
        tmp_path,
    )


def test_names_that_were_kept_are_those_that_were_read(tmp_path: Path) -> None:
    run(
        """
from transformers.utils import import_utils
from serve.structures import kept
read, asked = import_utils.create_import_structure_from_path, []
folder = Path(import_utils.__file__).parents[1] / "models"
truth = read(str(folder))
for _ in range(2):
    assert kept(lambda path: asked.append(path) or read(path), "1")(folder) == truth
assert asked == [str(folder)]
""",
        tmp_path,
        begin="from pathlib import Path",
    )
