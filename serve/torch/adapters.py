"""The adapters of an engine: their names, the pool that holds them, and the thread that reads them from disk."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import safe_open

from serve.folders import MAGNITUDE, MERGE_FIRST, AdapterFolder, ModelFolder, check_fits, misfit, read_adapter
from serve.generation import Generation, UnknownAdapter
from serve.torch.lora import MultiLora
from serve.torch.low_rank import Scale, Weights
from serve.torch.pool import Pool, PoolStats
from suite.errors import SuiteError, near

log = logging.getLogger("serve")


class Adapters:
    """Adapters by name, as many as there are on disk, with `memory` bytes of them in memory at most.

    A name may be given to another adapter at any time: generations keep the one that they were submitted with, which
    is `Generation.weights`. `register`, `unregister` and `find` are called with a lock held, `check` in any thread, the
    rest in the engine's; `wake` is called in a thread of its own when one was read.
    """

    def __init__(self, model: Any, base: ModelFolder, memory: int, wake: Callable[[], None]) -> None:
        self.lora = MultiLora(model, memory)
        self._base, self._dtype, self._wake = base, model.dtype, wake
        self._called: set[str] = model.called
        self._modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self._itemsize: int = model.dtype.itemsize
        self._named: dict[str, AdapterFolder] = {}
        self._retired: list[AdapterFolder] = []
        self._pool: Pool[Any, Weights, Generation] = Pool(memory, self._size)
        self._wanted: SimpleQueue[AdapterFolder | None] = SimpleQueue()
        self._read: deque[tuple[AdapterFolder, Weights | SuiteError]] = deque()
        self._thread = threading.Thread(target=self._read_all, name="adapters", daemon=True)

    @property
    def names(self) -> list[str]:
        """What requests may ask for."""
        return list(self._named)

    def check(self, path: Path) -> AdapterFolder:
        """Read a folder's headers; raises SuiteError for an adapter that cannot be served here."""
        folder = read_adapter(path, dora=True)
        check_fits(folder, self._base)
        self._check_heeded(folder)
        if self._base.quantized:
            if folder.dora:
                raise SuiteError(
                    "a DoRA adapter cannot be served on a quantized base", where=str(path), hint=MERGE_FIRST
                )
            for name, module in folder.modules.items():
                shape = self.lora.shape(name)
                if shape and shape != (module.outputs, module.inputs):
                    raise misfit(folder, name, self._base, shape)
        if self._size(folder) > self._pool.budget:
            raise SuiteError(
                f"this adapter takes {self._size(folder) / 2**20:.0f} MiB of memory, more than the "
                f"{self._pool.budget / 2**20:.0f} MiB for all of them",
                where=str(path),
                hint="give adapters more memory",
            )
        return folder

    def register(self, name: str, folder: AdapterFolder) -> None:
        """Give an adapter that was checked a name; one that had the name before leaves when nobody uses it."""
        if name in self._named:
            self._retired.append(self._named[name])
        self._named[name] = folder

    def unregister(self, name: str) -> None:
        """Take a name away; raises SuiteError for an unknown one."""
        self._retired.append(self.find(name))
        del self._named[name]

    def find(self, name: str) -> AdapterFolder:
        """The adapter that has this name now; raises UnknownAdapter."""
        if name not in self._named:
            raise UnknownAdapter(f"unknown adapter '{name}'", hint=near(name, self._named))
        return self._named[name]

    def retire(self) -> None:
        """Let go what lost its name. What was submitted before must be parked."""
        while self._retired:
            self._pool.retire(self._retired.pop())

    @property
    def changed(self) -> bool:
        """Whether there is something new for `retire` or `admit`."""
        return bool(self._retired or self._read)

    @property
    def parked(self) -> list[Generation]:
        """What waits for its adapter, in order of arrival."""
        return [generation for generation, _ in self._pool.parked]

    def park(self, generation: Generation) -> None:
        """Let a generation wait until its adapter is in memory."""
        self._pool.park(generation, generation.weights)

    def remove(self, generation: Generation) -> bool:
        """Forget a parked generation; False if it is not parked."""
        return self._pool.remove(generation)

    def admit(
        self, running: Callable[[], Iterable[Generation]]
    ) -> tuple[list[Generation], list[tuple[Generation, SuiteError]]]:
        """The generations that go on now, and those whose adapter cannot be read, with the reason.

        `running` gives all that went on before and have not ended.
        """
        failed: list[tuple[Generation, SuiteError]] = []
        while self._read:
            folder, read = self._read.popleft()
            if isinstance(read, SuiteError):
                failed += [(generation, read) for generation in self._pool.failed(folder)]
            else:
                self._pool.loaded(folder, read)
        if self._pool.idle:
            return [], failed
        in_use = {generation.weights for generation in running()}
        if not in_use:
            self.lora.select([], self._pool.resident)  # what the last batch had is let go
        go, load = self._pool.admit(in_use)
        for folder in load:
            self._wanted.put(folder)
        if load and not self._thread.is_alive():
            self._thread.start()
        return go, failed

    def select(self, rows: Sequence[Generation], width: int) -> None:
        """Say which rows the next forward pass has, and how many tokens each."""
        self.lora.select([generation.weights for generation in rows], self._pool.resident, width)

    def stats(self) -> PoolStats:
        """How the pool is at the moment."""
        return self._pool.stats()

    def close(self) -> None:
        """End the thread."""
        self._wanted.put(None)

    def _check_heeded(self, folder: AdapterFolder) -> None:
        """Raise SuiteError for a change to a layer whose weights the model takes without calling it, as Mamba's.

        Where every linear layer was trained they have tensors too, and B is zero: PEFT is not heeded there either.
        """
        mute = folder.modules.keys() - self._called
        if not mute:
            return
        with safe_open(folder.weights, "pt", backend="pread") as file:
            tensors = {key.removeprefix("base_model.model."): t for key, t in file.get_tensors().items()}
        for name in sorted(mute):
            if name not in self._modules:
                raise SuiteError(
                    f"its {name} has another name in the model that is served", where=str(folder.path), hint=MERGE_FIRST
                )
            if tensors[f"{name}.lora_B.weight"].any():
                raise SuiteError(
                    f"its {name} would not be heeded: the model takes that layer's weights without calling it",
                    where=str(folder.path),
                    hint=MERGE_FIRST,
                )

    def _size(self, folder: AdapterFolder) -> int:
        return folder.parameters * self._itemsize

    def _read_all(self) -> None:
        while (folder := self._wanted.get()) is not None:
            self._read.append((folder, self._weights_or_why(folder)))
            self._wake()

    def _weights_or_why(self, folder: AdapterFolder) -> Weights | SuiteError:
        try:
            return self._weights(folder)
        except SuiteError as error:
            found = error
        except OSError as error:  # whose text names the place, which is no client's business
            found = SuiteError(f"cannot be read: {error.strerror or type(error).__name__}", where=str(folder.path))
        except Exception as error:
            found = SuiteError(f"cannot be read: {error}", where=str(folder.path))
        log.warning("an adapter's requests end with an error: %s", found)
        return found

    def _weights(self, folder: AdapterFolder) -> Weights:
        folder.check_unchanged()
        # not mapped into memory: a file that is cut off meanwhile would end the process
        with safe_open(folder.weights, "pt", backend="pread") as file:
            tensors = {
                name.removeprefix("base_model.model.").removesuffix(".weight"): t
                for name, t in file.get_tensors().items()
            }
        folder.check_unchanged()
        # as few operations as may be: each makes the engine's thread wait for the interpreter
        sizes = [size for m in folder.modules.values() for size in (m.rank * m.inputs, m.rank * m.outputs)]
        memory = torch.empty(sum(sizes), dtype=self._dtype)
        pieces = iter(memory.split_with_sizes(sizes))
        layers = {
            name: (next(pieces).view(m.rank, -1), next(pieces).view(m.rank, -1)) for name, m in folder.modules.items()
        }
        scaled = torch._foreach_mul(
            [tensors[f"{name}.lora_B"].float() for name in layers], [m.scaling for m in folder.modules.values()]
        )
        torch._foreach_copy_([a for a, _ in layers.values()], [tensors[f"{name}.lora_A"] for name in layers])
        torch._foreach_copy_([b for _, b in layers.values()], [b.T for b in scaled])
        scales: dict[str, Scale] = {}
        for name, module in folder.modules.items():
            if module.dora:
                scales[name] = self.lora.scale(name, *layers[name], tensors[f"{name}{MAGNITUDE}"])
                layers[name][1].mul_(scales[name].gain.to(layers[name][1]))
        if not memory.sum(dtype=torch.float32).isfinite():
            self._check_finite(folder, layers)
        return Weights({name: (a.to(d := self.lora.device(name)), b.to(d)) for name, (a, b) in layers.items()}, scales)

    @staticmethod
    def _check_finite(folder: AdapterFolder, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, pair in layers.items():
            if not all(t.isfinite().all() for t in pair):
                # they would make keys and values that stay in the cache behind the end of other rows
                raise SuiteError(f"its {name} has numbers that are not finite", where=str(folder.weights))
