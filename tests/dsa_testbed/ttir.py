"""Triton's own code of a launch, before any chip's: it takes tens of milliseconds and no GPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from dsa_kernels.arch import Arch
from dsa_kernels.launch import Launch

SCRIPT = Path(__file__).resolve().parents[2] / "ci" / "compile_kernels.py"
# What hands a value on with another shape or width.
_SAME_VALUE = {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "arith.extsi"}


@cache
def compile_script() -> Any:
    """ci/compile_kernels.py as a module."""
    spec = spec_from_file_location("compile_kernels", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ttir(launch: Launch, arch: Arch) -> str:
    """TTIR of what `launch` would run, all functions inlined."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend: Any = make_backend(arch.target)
    source = compile_script().source(launch, arch)
    options = backend.parse_options(dict(launch.config.compile_options))
    context = ir.context()
    stages: dict[str, Any] = {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    module = source.make_ir(
        arch.target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    return str(stages["ttir"](module, {}))


def int32_factors(code: str) -> Iterator[str]:
    """Arguments of a kernel that its TTIR multiplies in int32, once for each product."""
    signature = re.search(r"tt\.func public @\w+\((.*)\)", code)
    assert signature
    arguments = set(re.findall(r"%\w+(?=:)", signature[1]))
    operands: dict[str, tuple[str, list[str]]] = {}
    products: list[list[str]] = []
    for line in code.splitlines():
        found = re.match(r" *(%\w+) = ([\w.]+) (.*?)(?: loc\(.*)?$", line)
        if found is None:
            continue
        result, operation, rest = found.groups()
        operands[result] = operation, re.findall(r"%\w+", rest)
        if operation == "arith.muli" and re.search(r"\b(tensor<[x\d]+x)?i32>?$", rest):
            products.append(operands[result][1])
    for product in products:
        for factor in product:
            while operands.get(factor, ("",))[0] in _SAME_VALUE:
                (factor,) = operands[factor][1]
            if factor in arguments:
                yield factor.removeprefix("%")
