"""Run by the interpreter of the environment `evalscope`, as `python evalscope_script.py JOB.json`.

It imports nothing of the suite, and the suite does not import it. JOB.json has the fields of EvalScope's TaskConfig;
the API key is in the environment variable OPENAI_API_KEY. EvalScope leaves predictions, reviews and reports in the
task's work_dir, and this script beside them `failures.jsonl` with the questions that got no answer, which EvalScope
leaves out. Each answer is appended to `answers.jsonl` beside JOB.json as it comes, and those that lie there are not
asked for again: EvalScope's own cache knows neither the data nor the weights, and who starts this sees to both. Prints
a line `{"step": ..., "total": ..., "what": ...}` for each question that is done.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalscope import TaskConfig, run_task
from evalscope.api.model import ModelOutput
from evalscope.evaluator import evaluator
from evalscope.models.openai_compatible import OpenAICompatibleAPI

Kept = runpy.run_path(str(Path(__file__).with_name("kept.py")))["Kept"]


def watched(run: Callable[..., Any], name: str, failures: Path) -> Callable[..., Any]:
    """EvalScope's loop over questions, which also says how far it is and keeps what failed."""

    def loop(items: list[Any], worker: Any, *, on_result: Any, on_error: Any, total: int, **options: Any) -> Any:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            print(json.dumps({"step": done, "total": total, "what": name}), flush=True)

        def answered(item: Any, result: Any) -> None:
            step()
            on_result(item, result)

        def failed(item: Any, error: Exception) -> None:
            step()
            asked = item.sample.input
            prompt = asked if isinstance(asked, str) else [{"role": m.role, "content": m.text} for m in asked]
            lost = {
                "subset": item.subset, "index": item.sample.id, "prompt": prompt, "target": item.sample.target,
                "error": str(error),
            }  # fmt: skip
            with failures.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lost, ensure_ascii=False) + "\n")
            on_error(item, error)

        return run(items, worker, on_result=answered, on_error=failed, total=total, **options)

    return loop


def remembering(generate: Callable[..., Any], kept: Any) -> Callable[..., Any]:
    """EvalScope's way to ask an endpoint, which takes what an earlier run was answered and keeps what comes."""

    def answer(self: Any, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:  # EvalScope's names
        asked = [
            self.model_name, [message.model_dump(mode="json", exclude={"id"}) for message in input],
            [tool.model_dump(mode="json") for tool in tools], str(tool_choice), config.model_dump(mode="json"),
        ]  # fmt: skip
        if (known := kept.take(asked)) is not None:
            return ModelOutput.model_validate(known)
        output = generate(self, input=input, tools=tools, tool_choice=tool_choice, config=config)
        if output.time is not None:  # else it is what an endpoint said when it refused
            kept.add(asked, output.model_dump(mode="json"))
        return output

    return answer


def main(file: Path) -> None:
    job = json.loads(file.read_text("utf-8"))
    failures = Path(job["work_dir"]) / "failures.jsonl"
    loop = evaluator.run_in_threads_with_progress
    evaluator.run_in_threads_with_progress = watched(loop, job["datasets"][0], failures)
    with Kept(file.with_name("answers.jsonl")) as kept:
        OpenAICompatibleAPI.generate = remembering(OpenAICompatibleAPI.generate, kept)
        run_task(TaskConfig(**job, api_key=os.environ["OPENAI_API_KEY"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
