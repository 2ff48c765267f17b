"""A model that is never in memory whole: each layer's weights are read when it is called, and dropped after it.

Transformers builds the model without memory (on the meta device), names its parameters and converts what it stores
otherwise than it computes (fused experts); peft puts an adapter on top. Only where the weights are changes: a decoder
layer, or a module outside of them (embedding, norm, head), is a unit that reads its weights as float32 when it is
called. Nothing is written.

Many questions share a pass over the weights. Each is asked in a thread of its own that waits where it needs a unit;
the unit then answers all that wait for it. One runs at a time and each alone, so the numbers are those of a model in
memory.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from export.lora.adapter import read_weights
from export.lora.arithmetic import DTYPES, one_thread
from export.tensors import Tensor, read_checkpoint
from suite.errors import SuiteError

WHOLE = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""Types that stay as they are; all others become float32."""
TRAINED_TOKENS = ".trainable_tokens_delta."


class Streamed:
    """The model in `folder`, with an adapter on top if given; call it as any model of transformers.

    An adapter that brings new tokens holds the whole embedding; `tokens` is how many there are then. Memory: the
    largest unit (up to three times a parameter into which experts are fused), and what the questions need. Raises
    SuiteError where checkpoint or adapter lack a parameter.
    """

    def __init__(
        self, folder: Path, adapter: Path | None = None, device: str = "cpu", tokens: int | None = None
    ) -> None:
        self.device = device
        base = _skeleton(folder, tokens)
        self.checkpoint = checkpoint = Checkpoint(base, read_checkpoint(folder), str(folder))
        _fill_buffers(base, set(checkpoint.maker), device)
        units = {path: Unit(path, checkpoint, device, tokens is not None) for path in (*_paths(base), "")}
        for name in checkpoint.maker:
            units[_owner(name, units)].weights.append((Slot.of(base, name), name))
        self.module = base
        if adapter:
            self.module, changes = _adapted(base, adapter, device)
            for name, tensor in changes:
                # trained tokens are few, and a head that is tied to its embedding uses the embedding's
                owner = "" if TRAINED_TOKENS in name else _owner(name, units)
                units[owner].changes.append((Slot.of(base, name), tensor))
        units.pop("").load()  # what no module of its own holds stays in memory
        self.units = [unit for unit in units.values() if unit.weights]
        for unit in self.units:
            unit.clear()
            module = base.get_submodule(unit.path)
            module.forward = partial(self._answer, unit, module.forward)
        self.module.eval()

    def __call__(self, **inputs: Any) -> Any:
        """What the model says, as from transformers."""
        return self.module(**inputs)

    @torch.inference_mode()
    def together(self, questions: Sequence[Callable[[], Any]], tell: Callable[[int], None]) -> list[Any]:
        """The results of `questions`, which call this model; those at the same unit share its weights.

        `tell` is given the number of units that were read so far.
        """
        asked = [_Question(question) for question in questions]
        try:
            with one_thread():
                for question in asked:
                    question.start()
            read = 0
            while unit := next((question.unit for question in asked if question.unit), None):
                with unit.loaded():
                    for question in asked:
                        if question.unit is unit:
                            question.go_on()
                read += 1
                tell(read)
        finally:
            for question in asked:
                question.stop()
        return [question.result for question in asked]

    def _answer(self, unit: Unit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = partial(forward, *args, **kwargs)
        question = threading.current_thread()
        if isinstance(question, _Question):
            return question.wait_for(unit, call)
        with unit.loaded():
            return call()


class _Question(threading.Thread):
    """A question being asked; it and the thread that holds the weights run in turns, never at the same time."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result = work, None
        self.unit: Unit | None = None
        self.call: Callable[[], Any] = lambda: None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.stopped = False
        self.mine, self.other = threading.Semaphore(0), threading.Semaphore(0)

    def start(self) -> None:
        """Run up to where a unit is needed."""
        super().start()
        self._wait()

    def run(self) -> None:
        # a thread takes the number of its workers now, and keeps it: the weights are used in the other one
        torch.get_num_threads()
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        self.unit = None
        self.other.release()

    def wait_for(self, unit: Unit, call: Callable[[], Any]) -> Any:
        """In this thread: what `call()` returns in the other one, once the unit is there."""
        self.unit, self.call = unit, call
        self.other.release()
        self.mine.acquire()
        answer, self.answer = self.answer, None
        if self.stopped:
            raise SystemExit
        return answer

    def go_on(self) -> None:
        """In the other thread: answer, and let this one run up to where it needs the next unit."""
        self.answer = self.call()
        self.call = lambda: None
        self.mine.release()
        self._wait()

    def stop(self) -> None:
        """In the other thread: end this one wherever it waits."""
        if self.is_alive():
            self.stopped = True
            self.mine.release()
            self.join()

    def _wait(self) -> None:
        self.other.acquire()
        if self.error:
            raise self.error


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of a module."""

    module: torch.nn.Module
    name: str

    @classmethod
    def of(cls, model: torch.nn.Module, name: str) -> Slot:
        """The place of the parameter that the model calls `name`."""
        path, _, attribute = name.rpartition(".")
        return cls(model.get_submodule(path), attribute)

    def fill(self, value: torch.Tensor) -> None:
        """Put `value` there."""
        if self.name in self.module._parameters:
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(self.module, self.name, value)

    def clear(self, device: str) -> None:
        """Put one number there that has the shape of all: it is on the right device, and using it is seen."""
        before = getattr(self.module, self.name)
        nothing = math.nan if before.is_floating_point() else 0
        self.fill(torch.full((), nothing, dtype=before.dtype, device=device).expand(before.shape))


@dataclass(eq=False)
class Unit:
    """A module whose weights come and go together; `weights` are the base's, `changes` the adapter's.

    Where the vocabulary is `resized`, rows that the base lacks are no numbers: the adapter has them, or nobody asks.
    """

    path: str
    checkpoint: Checkpoint
    device: str
    resized: bool
    weights: list[tuple[Slot, str]] = field(default_factory=list)
    changes: list[tuple[Slot, Tensor]] = field(default_factory=list)

    def load(self) -> None:
        """Read the weights; raises SuiteError for one of another shape than the configuration says."""
        values = self.checkpoint.read([name for _, name in self.weights], self.device)
        for slot, name in self.weights:
            value, wanted = values[name], getattr(slot.module, slot.name).shape
            if self.resized and value.shape[1:] == wanted[1:]:
                value = _with_rows(value, wanted[0])
            if value.shape != wanted:
                text = f"'{name}' is {tuple(value.shape)} in the checkpoint, and {tuple(wanted)} by its config.json"
                raise SuiteError(text)
            slot.fill(value)
        for slot, tensor in self.changes:
            slot.fill(read(tensor, self.device))

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Have the weights while inside."""
        try:
            self.load()
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        """Drop them."""
        for slot, _ in (*self.weights, *self.changes):
            slot.clear(self.device)


class Checkpoint:
    """Which tensors of a checkpoint make which parameters of `model`, as transformers would load it.

    `adjust` is given each parameter that was read, with its name, and may change it in place. Raises SuiteError for a
    checkpoint that lacks a parameter.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.model = model
        state = model.state_dict(keep_vars=True)
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.converters = {pattern: c for c in converters for pattern in c.source_patterns}
        self.parts: dict[str, list[tuple[str | None, Tensor]]] = {}
        prefix = model.base_model_prefix
        for key in sorted(tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name in state:
                self.parts.setdefault(name, []).append((pattern, tensors[key]))
        made = {target: name for name in self.parts for target in self._targets(name)}
        # tied parameters are one object here, and one of their names is in the checkpoint
        names = {id(state[name]): name for name in made if name in state}
        self.origin = {n: n if n in made else names[id(value)] for n, value in state.items() if id(value) in names}
        self.maker = {name: made[origin] for name, origin in self.origin.items()}
        self.adjust: Callable[[str, torch.Tensor], None] = lambda *_: None
        buffers = {name for name, _ in model.named_buffers()}
        if lost := sorted(state.keys() - self.maker.keys() - buffers):
            raise SuiteError(f"the checkpoint lacks '{lost[0]}'", where=where)

    def _targets(self, name: str) -> list[str]:
        pattern = self.parts[name][0][0]
        if pattern is None:
            return [name]
        targets = self.converters[pattern].target_patterns
        return [name.replace(targets[0], target) for target in targets]

    def read(self, names: Sequence[str], device: str) -> dict[str, torch.Tensor]:
        """The parameters called `names`, on `device`."""
        found: dict[str, torch.Tensor] = {}
        for maker in dict.fromkeys(self.maker[name] for name in names):
            found |= self._make(maker, device)
        return {name: found[self.origin[name]] for name in names}

    def _make(self, name: str, device: str) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import WeightRenaming

        pattern, first = self.parts[name][0]
        transform = deepcopy(self.converters[pattern]) if pattern else WeightRenaming(first.name, name)
        for pattern, tensor in self.parts[name]:
            transform.add_tensor(name, tensor.name, pattern or tensor.name, partial(read, tensor, device))
        converted = transform.convert(name, model=self.model, config=self.model.config)
        made = {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}
        for key, value in made.items():
            self.adjust(key, value)
        return made


def read(tensor: Tensor, device: str) -> torch.Tensor:
    """A tensor of a checkpoint, as float32, in memory that goes back to the system when the tensor is dropped."""
    stored = WHOLE.get(tensor.dtype) or DTYPES[tensor.dtype]
    wanted, count = stored if tensor.dtype in WHOLE else torch.float32, math.prod(tensor.shape)
    # not from malloc, which would keep it: the layers leave holes between what lasts longer
    memory = mmap.mmap(-1, max(1, count * wanted.itemsize), flags=mmap.MAP_PRIVATE)
    out = torch.frombuffer(memory, dtype=wanted, count=count) if count else torch.empty(0)
    position = 0
    for block in tensor.blocks():
        part = torch.frombuffer(block, dtype=stored)
        out[position : position + len(part)] = part
        position += len(part)
    return out.view(tensor.shape).to(device)


def _with_rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    more = value.new_full((max(0, rows - len(value)), *value.shape[1:]), math.nan)
    return torch.cat([value[:rows], more])


def _skeleton(folder: Path, tokens: int | None) -> Any:
    """The model without weights, for another number of `tokens` if given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if tokens is not None:
        config.get_text_config().vocab_size = tokens
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _fill_buffers(model: Any, stored: set[str], device: str) -> None:
    """Compute the buffers that no checkpoint holds, such as the frequencies of rotary embeddings."""
    for name, buffer in model.named_buffers():
        if name not in stored:
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, torch.empty_like(buffer, device=device))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()


def _paths(module: torch.nn.Module, prefix: str = "") -> Iterator[str]:
    """The units of a model: the members of its outermost lists of layers, and modules without parts outside them."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        is_list = isinstance(child, torch.nn.ModuleList)
        if (isinstance(module, torch.nn.ModuleList) and not is_list) or not any(True for _ in child.children()):
            yield path
        else:
            yield from _paths(child, f"{path}.")


def _owner(name: str, units: Mapping[str, Unit]) -> str:
    parts = name.split(".")
    return next((path for n in range(len(parts), 0, -1) if (path := ".".join(parts[:n])) in units), "")


def _adapted(base: Any, adapter: Path, device: str) -> tuple[Any, list[tuple[str, Tensor]]]:
    """`base` with an empty adapter, and which tensor belongs to which of its parameters."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(adapter))
    if config.is_prompt_learning:
        raise SuiteError(f"a {config.peft_type.value} adapter needs its base in memory whole", where=str(adapter))
    config.inference_mode = True
    own = set(map(id, base.state_dict(keep_vars=True).values()))
    model = PeftModel(base, config, low_cpu_mem_usage=True)
    tensors = read_weights(adapter)
    marks = {key: torch.nn.Parameter(torch.empty(t.shape, device="meta"), False) for key, t in tensors.items()}
    unread = set_peft_model_state_dict(model, dict(marks), low_cpu_mem_usage=True).unexpected_keys
    marks = {key: mark for key, mark in marks.items() if key not in unread}  # a tied head's copy of its embedding's
    state = base.state_dict(keep_vars=True)
    placed = {id(value): name for name, value in state.items()}
    if all(id(mark) in placed for mark in marks.values()):
        own |= set(map(id, marks.values()))
        if lost := next((name for name, value in state.items() if id(value) not in own), None):
            raise SuiteError(f"the adapter lacks '{lost}'", where=str(adapter))
        return model, [(placed[id(mark)], tensors[key]) for key, mark in marks.items()]
    # peft has joined some of them (experts): they stay in memory
    whole = {key: read(tensor, device) for key, tensor in tensors.items()}
    set_peft_model_state_dict(model, whole, low_cpu_mem_usage=True)
    return model, []
