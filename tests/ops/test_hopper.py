"""sparse_mla's experimental Gluon form: a model runs it, the compiler compiles it for sm90."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from dsa_kernels.arch import ARCHS, is_interpreting
from dsa_kernels.launch import Launch
from dsa_kernels.layout import latent_fp8_views
from dsa_kernels.sparse_mla import hopper, kernel, reference
from dsa_kernels.testing import error
from dsa_testbed import gluon_model

SM90 = ARCHS["sm90"]
SCALE = 0.1
SCRIPT = Path(__file__).resolve().parents[2] / "ci" / "compile_kernels.py"


def latents(blocks: int, fp8: bool) -> Tensor:
    if not fp8:
        return torch.randn(blocks, 64, 576).bfloat16()
    cache = torch.empty(blocks, 64, 656, dtype=torch.uint8)
    nope, scale, rope = latent_fp8_views(cache)
    nope.copy_(torch.randn(nope.shape))
    scale.copy_(torch.rand(scale.shape) + 0.3)
    rope.copy_(torch.randn(rope.shape))
    return cache


@pytest.mark.skipif(is_interpreting(), reason="Gluon has no interpreter")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "k", "sms"), [(1, 64, 64, 1), (3, 64, 300, 1), (2, 80, 330, 16)]
)
def test_model(fp8: bool, rows: int, heads: int, k: int, sms: int) -> None:
    """Whole rows and parts; invalid slots, cut lengths, an empty row, a second block of heads."""
    torch.manual_seed(rows)
    arch = replace(SM90, num_sms=sms)
    cache = latents(6, fp8)
    q = torch.randn(rows, heads, 576).bfloat16()
    slots = torch.stack([torch.randperm(6 * 64)[:k] for _ in range(rows)])
    slots[:, 5] = -1
    slots[:, 9] = 1 << 40
    lens = torch.randint(1, k + 70, (rows,), dtype=torch.int32)
    lens[0], lens[-1] = k, 0 if rows > 1 else k
    out, want = torch.full((2, rows, heads, 512), torch.nan).bfloat16()
    lse, want_lse = torch.full((2, rows, heads), torch.nan)
    first = kernel.launches(q, cache, slots, lens, SCALE, out, lse, arch)[0]
    launch = hopper.take_over(first)
    assert (launch.grid[1] > 1) == (sms > 1)
    part_out, part_lse = launch.arguments["out"], launch.arguments["lse"]
    gluon_model.run(hopper, launch)
    reference.sparse_mla(q, cache, slots, lens, SCALE, want, want_lse)
    merged_lse = part_lse.logsumexp(1)
    weight = (part_lse - merged_lse[:, None]).exp().nan_to_num()
    merged = (part_out.float() * weight[..., None]).sum(1)
    assert error(merged.bfloat16(), want).rms < 4e-3
    torch.testing.assert_close(merged_lse, want_lse, atol=1e-5, rtol=1e-5)


def compiled(fp8: bool) -> tuple[Any, int]:
    """The kernel, and the bytes that a thread spills."""
    spec = spec_from_file_location("compile_kernels", SCRIPT)
    assert spec
    assert spec.loader
    script = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(script)
    from triton.experimental.gluon._runtime import GluonASTSource

    with torch.device("meta"):
        width, dtype = (656, torch.uint8) if fp8 else (576, torch.bfloat16)
        first: Launch = kernel.launches(
            torch.empty(4096, 128, 576, dtype=torch.bfloat16),
            torch.empty(64, 64, width, dtype=dtype),
            torch.empty(4096, 2048, dtype=torch.int64),
            torch.empty(4096, dtype=torch.int32),
            SCALE,
            torch.empty(4096, 128, 512, dtype=torch.bfloat16),
            torch.empty(4096, 128),
            SM90,
        )[0]
        launch = hopper.take_over(first)
    plain = script.source(launch, SM90)
    source = GluonASTSource(launch.kernel, plain.signature, plain.constants, plain.attrs)
    options = launch.config.compile_options
    found = triton.compile(source, target=SM90.target, options=options)
    return found, script._nvidia_resources(found.asm["cubin"])[1]


@pytest.mark.skipif(is_interpreting(), reason="Gluon has no interpreter")
@pytest.mark.parametrize("fp8", [False, True])
def test_compiled(fp8: bool) -> None:
    found, spilled = compiled(fp8)
    ptx = found.asm["ptx"]
    # 36 products of 16 values are the scores, 4 of 16 weights the sums: each once.
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n32k16") == 36
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n256k16") == 4
    assert ptx.count("cp.async.cg.shared.global") == (4 if fp8 else 36)
    assert found.metadata.shared <= SM90.smem_bytes
    assert (spilled > 0) == (fp8 and not triton.__version__.startswith("3.6."))


def test_refusal() -> None:
    q, cache = torch.empty(1, 64, 576).bfloat16(), latents(1, fp8=False)
    assert hopper.refusal(q, cache, SM90) == ""
    assert "wgmma" in hopper.refusal(q, cache, ARCHS["sm100"])
    assert "float32" in hopper.refusal(q.float(), cache.float(), SM90)
    apart = torch.empty(1, 64, 577).bfloat16()[..., :576]
    assert "multiple of 16" in hopper.refusal(q, apart, SM90)
    refused = hopper.refusal(q, latents(1, fp8=True), SM90)
    assert ("spills" in refused) == (not triton.__version__.startswith("3.6."))
