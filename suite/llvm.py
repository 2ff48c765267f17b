"""Functions in LLVM's language, compiled for the processor that they run on."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import binding


class Compiled(NamedTuple):
    """The address of a function, and what owns its machine code."""

    address: int
    owner: Any


def has(feature: str) -> bool:
    """Whether the processor has a feature, by the name that LLVM gives it: `avx512f`."""
    return bool(binding.get_host_cpu_features().get(feature))


def compiled(text: str, name: str) -> Compiled:
    """The function `name` of a module, given as text.

    Of all that LLVM can do before it writes machine code, only variables are brought into registers: it takes a few
    hundredths of a second, and what is given is made of vectors already.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    if has("avx512f"):
        features += ",-prefer-256-bit"  # for some processors LLVM halves vectors of 512 bits otherwise
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True
    )
    module = binding.parse_assembly(text)
    _tidy(module, machine)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return Compiled(engine.get_function_address(name), engine)


def _tidy(module: Any, machine: Any) -> None:
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=1))
    passes = binding.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)


def know(name: str, address: int) -> None:
    """Let functions that are compiled later call this one by its name."""
    binding.add_symbol(name, address)
