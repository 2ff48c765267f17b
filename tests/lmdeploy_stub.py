"""LMDeploy without its kernels, for machines that have no GPU: `lmdeploy_stub.py serve api_server MODEL ...`.

Its command line, chat templates, tokenizer, AsyncEngine, sampling parameters, guided decoding, parsers and routes are
its own. Only the engine below them is another one: transformers and peft, in float32, one step of one request at a time.
It runs in LMDeploy's environment and shows what its server makes of requests, nothing of how it computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from lmdeploy.cli.entrypoint import run
from lmdeploy.messages import EngineOutput, RequestMetrics, ResponseType, ScheduleMetrics
from lmdeploy.pytorch.engine.guided_process import GuidedDecodingManager
from lmdeploy.pytorch.messages import SamplingParam
from peft import PeftModel


class Sequence:
    """One request: its tokens, what the model keeps of them, and how the next one is picked."""

    def __init__(self, ids: list[int], sampling: SamplingParam, grammar: Any) -> None:
        self.ids, self.sampling, self.grammar = list(ids), sampling, grammar
        self.new, self.cache = 0, None
        self.random = torch.Generator().manual_seed(sampling.random_seed % 2**63)
        given, warpers = sampling, transformers.LogitsProcessorList()
        if given.repetition_penalty != 1:
            warpers.append(transformers.RepetitionPenaltyLogitsProcessor(given.repetition_penalty))
        if given.temperature != 1:
            warpers.append(transformers.TemperatureLogitsWarper(given.temperature))
        if given.top_k > 0:
            warpers.append(transformers.TopKLogitsWarper(given.top_k))
        if given.top_p < 1:
            warpers.append(transformers.TopPLogitsWarper(given.top_p))
        if given.min_p > 0:
            warpers.append(transformers.MinPLogitsWarper(given.min_p))
        self.warpers = warpers

    def pick(self, logits: torch.Tensor, guide: GuidedDecodingManager) -> int:
        """The next token, of logits (V,)."""
        for processor in self.sampling.logits_processors or ():
            logits = processor(self.ids, logits)
        held = self.sampling.stop_words if self.new < self.sampling.min_new_tokens else []
        logits[[*self.sampling.bad_words, *held]] = -torch.inf
        logits = logits[None]
        if self.grammar is not None:
            allowed = guide.allocate_batched_bitmap(1)
            guide.fill_bitmap(self.grammar, allowed, 0)
            guide.apply_batched_bitmap(logits, allowed)
        scores = self.warpers(torch.tensor([self.ids]), logits)
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self.random))


class StubEngine:
    """What AsyncEngine asks of an engine."""

    def __init__(self, path: str, config: Any) -> None:
        self.engine_config, self.steps = config, 0
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.adapters = dict(config.adapters or {})
        for number, (name, folder) in enumerate(self.adapters.items()):
            if number:
                self.model.load_adapter(folder, name)
            else:
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
        self.guide = GuidedDecodingManager(self.tokenizer, None)
        self.thread = ThreadPoolExecutor(1)

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """The model with that adapter, or without any."""
        if adapter is not None:
            self.model.set_adapter(adapter)
        with self.model.disable_adapter() if self.adapters and adapter is None else contextlib.nullcontext():
            yield

    def step(self, sequence: Sequence, adapter: str | None) -> tuple[int, dict[int, float] | None]:
        """One token, and log probabilities of the likeliest and of itself, as far as they are asked for."""
        fresh = torch.tensor([sequence.ids if sequence.cache is None else sequence.ids[-1:]])
        with torch.inference_mode(), self.using(adapter):
            said = self.model(input_ids=fresh, past_key_values=sequence.cache, use_cache=True)
            logits = said.logits[0, -1].float()
            logprobs = logits.log_softmax(-1)
            token = sequence.pick(logits, self.guide)
        sequence.cache = said.past_key_values
        sequence.ids.append(token)
        sequence.new += 1
        self.steps += 1
        if sequence.sampling.num_logprobs < 0:
            return token, None
        values, ids = logprobs.topk(sequence.sampling.num_logprobs)
        return token, {token: float(logprobs[token]), **dict(zip(ids.tolist(), values.tolist(), strict=True))}

    def create_instance(self, *_: Any, **__: Any) -> Instance:
        """What computes one request after the other."""
        return Instance(self)

    def start_loop(self) -> bool:
        """Nothing has to be started."""
        return True

    def close(self) -> None:
        """End."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def get_schedule_metrics(self) -> ScheduleMetrics:
        """Only that it goes on."""
        return ScheduleMetrics(scheduler_tick=self.steps, active_seqs=1)

    async def get_health_status(self) -> dict[str, Any]:
        """Alive."""
        return {"alive": True, "message": "", "schedule_metrics": self.get_schedule_metrics()}


class Instance:
    """One place in the engine."""

    def __init__(self, engine: StubEngine) -> None:
        self.engine, self.cancelled = engine, False

    async def async_cancel(self, _: int) -> None:
        """End what runs."""
        self.cancelled = True

    async def async_stream_infer(
        self, session_id: int, input_ids: list[int], gen_config: Any, adapter_name: str | None = None, **_: Any
    ) -> AsyncIterator[EngineOutput]:
        """Tokens as they come."""
        self.cancelled, engine = False, self.engine
        sampling = SamplingParam.from_gen_config(gen_config)
        grammars = engine.guide.get_processors([{"session_id": session_id, "seq_id": 0}], (sampling.response_format,))
        sequence = Sequence(input_ids, sampling, grammars.get(0))
        try:
            async for output in self._generate(sequence, adapter_name):
                yield output
        finally:
            engine.guide.remove_processor(session_id)

    async def _generate(self, sequence: Sequence, adapter: str | None) -> AsyncIterator[EngineOutput]:
        engine, loop, most = self.engine, asyncio.get_running_loop(), sequence.sampling.max_new_tokens
        while True:
            token, logprobs = await loop.run_in_executor(engine.thread, engine.step, sequence, adapter)
            if sequence.grammar is not None:
                engine.guide.accept_token(sequence.grammar, token)
            full = sequence.new == most or len(sequence.ids) == engine.engine_config.session_len
            status = ResponseType.SUCCESS
            if self.cancelled:
                status = ResponseType.CANCEL
            elif full or token in sequence.sampling.stop_words:
                status = ResponseType.FINISH
            told = None if logprobs is None else [logprobs]
            yield EngineOutput(status, [token], told, req_metrics=RequestMetrics(time.time()))
            if status is not ResponseType.SUCCESS:
                return


def build(_: Any, model_path: str, backend_config: Any, **__: Any) -> StubEngine:
    """In place of LMDeploy's PyTorch engine."""
    torch.set_num_threads(1)
    return StubEngine(model_path, backend_config)


if __name__ == "__main__":
    # `import lmdeploy.serve.core...` finds a function of that name
    importlib.import_module("lmdeploy.serve.core.async_engine").AsyncEngine._build_pytorch = build
    run()
