"""Compile every kernel for every architecture, without a GPU, and list what the chips would get.

    ci/compile PYTHON                     # compile all, write docs/compile_matrix.md
    ci/compile PYTHON --check             # compile all, fail if that table is not the result
    ci/compile PYTHON --sample --check    # a case of each kernel and chip: what CI runs

A row is a launch that serving can reach: `compile_cases` of an op's kernel.py. It fails if a kernel
does not compile, spills registers to memory, needs more shared memory than its chip has, or lacks
the matrix instruction that its products ask for.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import dsa_kernels
from dsa_kernels.arch import ARCHS, KIB, Arch
from dsa_kernels.launch import Launch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "compile_matrix.md"
# These multiply 64 rows at least.
WIDE, WIDE_ROWS = ("wgmma", "tcgen05.mma"), 64
HEAD = f"""# What the compiler makes of each kernel

Written by `ci/compile`, with Triton {triton.__version__}; do not edit. Registers are those of a
thread, shared memory that of a block. No kernel spills registers to memory, takes more shared
memory than its chip has, or lacks the matrix instruction of its row: `ci/compile` refuses to write
the table otherwise. What ran on a chip is in [measured.md](measured.md).

Where a kernel multiplies, its instruction is the chip's own, but for two reasons. `wgmma` and
`tcgen05.mma` multiply {WIDE_ROWS} rows or more; a tile of fewer has `mma.sync`, and its row says
how many it has. NVIDIA's chips have no matrix instruction that multiplies fp32 unrounded.

| chip | launches | its instruction | used by | `mma.sync` instead | fp32 | no product |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Compiled:
    """One row of the table.

    Attributes:
        op, name, arch: which launch.
        config: blocks, warps and stages.
        registers: of a thread.
        spilled: bytes of a thread (NVIDIA: stack frame) or registers (AMD).
        smem_bytes: shared memory of a block.
        matrix: the matrix instruction that its products should use, or "" if there are none.
        remark: why that is not the chip's own: few rows, or fp32.
        has_matrix: whether it is in the code.
    """

    op: str
    name: str
    arch: str
    config: str
    registers: int
    spilled: int
    smem_bytes: int
    matrix: str
    remark: str
    has_matrix: bool

    def faults(self) -> Iterator[str]:
        """Why this must not be launched."""
        limit = ARCHS[self.arch].smem_bytes
        if self.spilled:
            yield f"spills {self.spilled}"
        if self.smem_bytes > limit:
            yield f"needs {self.smem_bytes} bytes of shared memory; a block has {limit}"
        if not self.has_matrix:
            yield f"multiplies without {self.matrix}"

    def line(self) -> str:
        """Of the table."""
        matrix = ", ".join(filter(None, (self.matrix, self.remark)))
        return (
            f"| {self.arch} | {self.name} | {self.config} | {self.registers} "
            f"| {self.smem_bytes / KIB:.1f} | {matrix} |\n"
        )


def ops() -> list[str]:
    """Folders of dsa_kernels that have a kernel."""
    package = Path(dsa_kernels.__file__).parent
    return sorted(path.parent.name for path in package.glob("*/kernel.py"))


@cache
def cases(op: str, arch: Arch) -> dict[str, Launch]:
    """Of all kernels of an op, by name; what two names share, Triton's own cache compiles once."""
    package = Path(dsa_kernels.__file__).parent
    found: dict[str, Launch] = {}
    for path in sorted(package.glob(f"{op}/*kernel.py")):
        found |= importlib.import_module(f"dsa_kernels.{op}.{path.stem}").compile_cases(arch)
    return found


def source(launch: Launch, arch: Arch) -> ASTSource:
    """What Triton's launcher would compile for these arguments; a meta tensor counts as aligned.

    By the launcher's own rules: on AMD's chips they also tell tensors of up to 2 GiB, whose loads
    then take other instructions, and fewer registers.
    """
    kernel, backend = launch.kernel, make_backend(arch.target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialised, _ = bind(**launch.arguments, **launch.config.blocks)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for number, (name, (kind, attribute)) in enumerate(zip(values, specialised, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = values[name]
        elif attribute:
            attributes[number,] = backend.parse_attr(attribute)
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(op: str, name: str, launch: Launch, arch: Arch) -> Compiled:
    kernel = triton.compile(
        source(launch, arch), target=arch.target, options=launch.config.compile_options
    )
    if arch.backend == "cuda":
        code = kernel.asm["ptx"]
        registers, spilled = _nvidia_resources(kernel.asm["cubin"])
    else:
        code = kernel.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers, which costs no memory.
        registers, spilled = _count(code, "vgpr_count"), _count(code, "private_segment_fixed_size")
    matrix, remark = expected_matrix(kernel.asm["ttir"], arch)
    config = launch.config
    blocks = ", ".join(f"{block} {size}" for block, size in config.blocks.items())
    return Compiled(
        op,
        name,
        arch.name,
        f"{blocks}; {config.num_warps} warps, {config.num_stages} stages",
        registers,
        spilled,
        kernel.metadata.shared,
        matrix,
        remark,
        matrix in code,
    )


def expected_matrix(ttir: str, arch: Arch) -> tuple[str, str]:
    """What the products in Triton's own code should become, and why that is not the chip's own."""
    products = re.findall(r"= tt\.dot .* -> tensor<(\d+)x\d+xf32>", ttir)
    operands = re.findall(r"= tt\.dot .* : tensor<\d+x\d+x(\w+)>", ttir)
    if not products:
        return "", ""
    if arch.backend == "cuda" and set(operands) == {"f32"}:
        return "", "fp32"
    rows = max(map(int, products))
    if arch.matrix_instruction in WIDE and rows < WIDE_ROWS:
        return "mma.sync", f"{rows} rows"
    return arch.matrix_instruction, ""


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as cuobjdump, which comes with Triton, reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    matches = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if len(matches) != 1:
        raise RuntimeError(f"cuobjdump -res-usage does not list one kernel:\n{usage}")
    registers, stack, local = map(int, matches[0])
    return registers, stack + local


def _count(amdgcn: str, field: str) -> int:
    match = re.search(rf"\.{field}:\s+(\d+)", amdgcn)
    if match is None:
        raise RuntimeError(f"no .{field} in the assembly of a kernel")
    return int(match[1])


def table(rows: list[Compiled]) -> str:
    """All rows as Markdown: a section an op, a line a case and chip."""
    parts = [HEAD]
    for arch in ARCHS.values():
        kinds = Counter((row.matrix, row.remark) for row in rows if row.arch == arch.name)
        own = kinds.pop((arch.matrix_instruction, ""), 0)
        fp32, none = kinds.pop(("", "fp32"), 0), kinds.pop(("", ""), 0)
        few = kinds.total()
        parts.append(
            f"| {arch.name} | {own + few + fp32 + none} | {arch.matrix_instruction} "
            f"| {own} | {few} | {fp32} | {none} |\n"
        )
    for op in sorted({row.op for row in rows}):
        parts.append(f"\n## {op}\n\n")
        parts.append(
            "| chip | case | blocks, warps, stages | registers | KiB shared | matrix unit |\n"
        )
        parts.append("|---|---|---|---|---|---|\n")
        parts.extend(row.line() for row in rows if row.op == op)
    return "".join(parts)


def work(sample: bool, archs: list[str], only: list[str]) -> list[tuple[str, str, str]]:
    """(op, arch, name) of the launches to compile; a sample: the first of each kernel and chip."""
    found = []
    for op in only:
        for arch in archs:
            seen = set()
            for name, launch in cases(op, ARCHS[arch]).items():
                if not sample or launch.kernel not in seen:
                    found.append((op, arch, name))
                seen.add(launch.kernel)
    return found


def compile_one(item: tuple[str, str, str]) -> Compiled | str:
    """The row, or why there is none."""
    op, arch_name, name = item
    arch = ARCHS[arch_name]
    try:
        return compile_launch(op, name, cases(op, arch)[name], arch)
    except Exception as error:  # noqa: BLE001 (Triton raises whatever its passes raise)
        return f"{op} {arch_name} {name}: {type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for every chip.")
    parser.add_argument(
        "--check", action="store_true", help="compare with the table, write nothing"
    )
    parser.add_argument("--sample", action="store_true", help="one case of each kernel and chip")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--op", nargs="+", choices=ops(), default=ops())
    options = parser.parse_args()
    items = work(options.sample, options.arch, options.op)
    rows, faults = [], []
    with ProcessPoolExecutor(options.jobs) as pool:
        results = zip(items, pool.map(compile_one, items), strict=True)
        for done, (item, result) in enumerate(results, 1):
            if isinstance(result, str):
                faults.append(result)
            else:
                rows.append(result)
                faults.extend(
                    f"{result.op} {result.arch} {result.name}: {fault}" for fault in result.faults()
                )
            print(f"{done}/{len(items)}", *item, file=sys.stderr)
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(rows)} of {len(items)} kernels compiled, {len(faults)} faults")

    if faults:
        return 1
    if options.check:
        recorded = TABLE.read_text(encoding="utf-8").splitlines(keepends=True)
        if HEAD.splitlines(keepends=True)[2] not in recorded:
            print(f"{TABLE.relative_to(ROOT)} is not of Triton {triton.__version__}: not compared")
            return 0
        # The head counts all rows, of which a sample has a few.
        lines = [row.line() for row in rows] if options.sample else table(rows).splitlines(True)
        for line in lines:
            if line not in recorded:
                faults.append(line)
                print(f"not in {TABLE.relative_to(ROOT)}: {line}", end="")
        if faults:
            print("Run ci/compile and commit the table.")
    elif items == work(False, list(ARCHS), ops()):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(rows), encoding="utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
