"""No offset of any kernel passes int32, however far apart rows, heads and pages lie."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import dsa_kernels
from dsa_kernels.arch import ARCHS
from dsa_kernels.launch import Launch
from dsa_kernels.tuning import LaunchConfig
from dsa_testbed.kernel_runs import DEVICE
from dsa_testbed.ttir import int32_factors, ttir

KERNELS = sorted(
    f"{path.parent.name}.{path.stem}"
    for path in Path(dsa_kernels.__file__).parent.glob("*/*kernel.py")
)
SM90 = ARCHS["sm90"]
FAR = 1 << 20  # a stride that is no constant to the compiler, as 1 is, and that int32 holds
# What may be multiplied in int32: its index ends with a head's values, the selection, the parts of
# one, a page, a block table's row; so the product ends within what one of them spans.
NEAR = re.compile(r"\w+_[dks]|block_table_b|cache_t")
# A tile's keys, and heads that `check_near_heads` has seen.
HEADS = {"q_h", "out_h", "lse_h", "weights_h"}
NEAR_OF_KERNEL = {
    "_attend_masked": {"k_n", "v_n"},
    **dict.fromkeys(("_attend", "_merge", "_score_rows", "_score_requests"), HEADS),
}


def strides_of(launch: Launch) -> dict[str, int]:
    """The arguments that `launch.strides` names, all of them FAR."""
    return {
        name: FAR
        for name, value in launch.arguments.items()
        if re.fullmatch(r"\w+_[trhsknpbd]", name) and isinstance(value, int)
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_strides_are_multiplied_in_int64(kernel: str) -> None:
    """Read from Triton's code: a product in int32 wraps before it is added to a pointer."""
    for name, launch in import_module(f"dsa_kernels.{kernel}").compile_cases(SM90):
        far = strides_of(launch)
        code = ttir(replace(launch, arguments={**launch.arguments, **far}), SM90)
        assert "arith.muli" in code
        near = NEAR_OF_KERNEL.get(launch.kernel.__name__, set())
        wrapping = {
            factor
            for factor in int32_factors(code)
            if factor in far and not NEAR.fullmatch(factor) and factor not in near
        }
        assert not wrapping, name


@triton.jit
def _copy_heads(x, x_t, x_h, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        head = head.to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    tl.store(x + row * x_t + (head * x_h)[:, None] + tl.arange(0, BLOCK)[None, :], 0.0)


@pytest.mark.parametrize(("wide", "expected"), [(False, ["x_h"]), (True, [])])
def test_a_product_in_int32_is_found(wide: bool, expected: list[str]) -> None:
    arguments = {"x": torch.empty(9, device="meta"), "x_t": FAR, "x_h": FAR, "WIDE": wide}
    launch = Launch(_copy_heads, (1, 1), arguments, LaunchConfig({"BLOCK": 16}, 4, 1))
    assert list(int32_factors(ttir(launch, SM90))) == expected


@triton.jit
def _copy(x, y, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index, mask=index < count), mask=index < BLOCK // 2)


@pytest.mark.triton
@pytest.mark.usefixtures("kernels_run")
def test_the_interpreter_refuses_what_lies_outside() -> None:
    if DEVICE.type != "cpu":
        pytest.skip("a GPU reads it, or loses its context")

    def copy(count: int, room: int) -> None:
        arguments = {"x": torch.ones(9), "y": torch.empty(room), "count": count}
        Launch(_copy, (1,), arguments, LaunchConfig({"BLOCK": 16}, 4, 1)).run()

    copy(9, 8)
    for count, room in ((10, 8), (9, 7)):
        with pytest.raises(Exception, match="1 addresses outside"):
            copy(count, room)
