"""Serving compiles each kernel once, at its start: no batch must make a request wait for one.

Triton compiles again where an integer becomes 1, or it or an address becomes a multiple of 16 or
ceases to be. Batches go through `attention.forward` on a CPU; what they would launch on a chip is
noted instead of run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton
from torch import Tensor

import dsa_kernels
from dsa_kernels.arch import ARCHS
from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.launch import Launch, launch_config
from dsa_kernels.testing import make_cos_sin_cache
from dsa_plugin import attention
from dsa_plugin.attention import warm_up
from dsa_plugin.attention.metadata import DSAMetadata, split_prefill

Variants = dict[str, dict[str, set[str]]]

SCRIPT = Path(__file__).resolve().parents[2] / "ci" / "compile_kernels.py"
HEADS, NOPE, V_HEAD_DIM, INDEX_HEADS, TOPK = 16, 128, 128, 64, 2048
WORKSPACE_BYTES = 64 << 20
MAX_TOKENS, MAX_BLOCKS = 1024, 160
# Contexts of the decodes, then rows and contexts of the prefills. One is masked; of fp8 latents the
# longest are decoded first, and selections of the last are not split.
BATCHES: list[tuple[list[int], list[tuple[int, int]]]] = [
    ([2500], []),
    ([70, 9], []),
    ([70], [(20, 90)]),
    ([2500, 9001], []),
    ([8192, 70, 4100], [(3, 2064)]),
    ([5000], [(1, 2049), (16, 4096), (40, 7003)]),
    ([2500] * 2, [(2, 2200)]),
    ([], [(64, 4099), (5, 5003)]),
    ([3000] * 5, [(800, 2111)]),
    ([], [(800, 2112)]),
    ([], [(300, 9000)]),
]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Variants]:
    """What a chip's kernels would be compiled for: by kernel, blocks and dtypes; then parameter."""
    spec = spec_from_file_location("compile_kernels", SCRIPT)
    assert spec
    assert spec.loader
    script = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(script)
    chip, _, version = request.param.partition(", Triton ")
    arch = ARCHS[chip]
    if version:
        monkeypatch.setattr(triton, "__version__", version)
    launch_config.cache_clear()
    found: Variants = defaultdict(lambda: defaultdict(set))

    def note(launch: Launch) -> None:
        source, values = script.source(launch, arch), {**launch.arguments, **launch.config.blocks}
        kind, assumed = [launch.kernel.__name__], {}
        for parameter in launch.kernel.params:
            name, index = parameter.name, (parameter.num,)
            dtype, constant = source.signature[name], source.constants.get(index)
            assumed[name] = f"{dtype} {constant} {source.attrs.get(index)}"
            if parameter.is_constexpr or values[name] is None:
                kind.append(f"{name}={constant}")
            elif isinstance(values[name], Tensor):
                kind.append(f"{name}: {dtype}")
        for name, what in assumed.items():
            found[" ".join(kind)][name].add(what)

    for path in Path(dsa_kernels.__file__).parent.glob("*/*.py"):
        module = import_module(f"dsa_kernels.{path.parent.name}.{path.stem}")
        for name, answer in (("use_triton", True), ("arch_of", arch)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda _device, answer=answer: answer)
    monkeypatch.setattr(Launch, "run", note)
    monkeypatch.setattr(torch, "bmm", shaped_like_bmm)
    yield found
    launch_config.cache_clear()
    assert found


@pytest.mark.parametrize(
    ("variants", "heads"),
    [("sm90", HEADS), ("gfx942", 128), ("sm90, Triton 3.6", 128)],
    indirect=["variants"],
)
@pytest.mark.parametrize("cache_dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("wide_table", [True, False], ids=["vLLM's table", "SGLang's table"])
@torch.inference_mode()
def test_batches_of_any_shape(
    variants: Variants, heads: int, cache_dtype: torch.dtype, wide_table: bool
) -> None:
    layer, rows = Layer(cache_dtype, heads), Rows()
    layer.warm_up(rows.batch([2500], [], wide_table))
    warm = set(variants)
    for decodes, prefills in BATCHES:
        layer.forward(rows.batch(decodes, prefills, wide_table))
    for decodes, prefills in BATCHES[1:4]:
        batch = rows.batch(decodes, prefills, wide_table)
        layer.forward(batch, reuse_selection=True)
        layer.without_indexer().forward(batch, reuse_selection=True)
    kernels = {kind.partition(" ")[0] for kind in variants}
    assert {"_score_requests", "_score_rows", "_attend", "_attend_masked", "_find_slots"} <= kernels
    assert set(variants) - warm == set(), "a request would wait for these"
    for kind, parameters in variants.items():
        assert {name: what for name, what in parameters.items() if len(what) > 1} == {}, kind


@pytest.mark.parametrize("variants", ["sm90"], indirect=True)
@pytest.mark.parametrize("context", [70, 2500])
@pytest.mark.usefixtures("variants")
@torch.inference_mode()
def test_a_decode_writes_and_rotates_in_one_launch(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few microseconds each, a layer would feel every one more."""
    names: list[str] = []
    run = Launch.run

    def named(launch: Launch) -> None:
        names.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", named)
    Layer(torch.uint8).forward(Rows().batch([context, context], [], wide_table=True))
    assert names[0] == "_write"
    assert names.count("_write") == 1


@pytest.mark.parametrize("variants", ["sm90"], indirect=True)
@torch.inference_mode()
def test_the_warm_up_takes_each_form_of_a_prefill(variants: Variants) -> None:
    """Whichever its own few rows would be given: here `forward` does nothing."""
    layer = Layer(torch.uint8)
    batch = Rows().batch([2500], [], wide_table=True)
    warm_up.launch_all(lambda *_, **__: None, layer.layer, layer.projections(1), batch, TOPK)
    kernels = {kind.partition(" ")[0] for kind in variants}
    assert {"_attend_masked", "_gather_latents", "_attend"} <= kernels


def test_the_warm_up_runs_once_and_not_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each kind of model: a draft's rows are another."""
    runs, capturing = [], False
    monkeypatch.setattr(warm_up, "_done", set())
    monkeypatch.setattr(warm_up, "use_triton", lambda _device: True)
    monkeypatch.setattr(warm_up, "launch_all", lambda *arguments: runs.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    gpu = Mock(is_cuda=True, shape=(1, HEADS, NOPE + 64))
    cpu, batch, draft = zeros(1), Mock(decode_query_len=1), Mock(decode_query_len=2)

    layer = Mock()

    def pass_by(q: Any, metadata: Any, layer: Any = layer) -> int:
        projections = Mock(q=q)
        warm_up.warm_up_gpu(Mock(), layer, projections, metadata, TOPK)
        return len(runs)

    capturing = True
    assert pass_by(gpu, batch) == 0
    capturing = False
    assert pass_by(cpu, batch) == 0
    assert pass_by(gpu, batch, Mock(indexer=None)) == 0
    assert pass_by(gpu, batch) == 1
    assert pass_by(gpu, batch) == 1
    assert pass_by(gpu, draft) == 2


class Rows:
    """A host's buffers, of which each batch takes the beginning."""

    def __init__(self) -> None:
        self.table = torch.zeros(8, MAX_BLOCKS, dtype=torch.int32)
        self.request_ids = torch.zeros(MAX_TOKENS, dtype=torch.int32)
        self.context_lens = torch.zeros(MAX_TOKENS, dtype=torch.int32)
        self.slot_mapping = torch.zeros(MAX_TOKENS, dtype=torch.int64)

    def batch(
        self, decodes: list[int], prefills: list[tuple[int, int]], wide_table: bool
    ) -> DSAMetadata:
        starts, lens = [*range(len(decodes) + 1)], [*decodes]
        for new, context in prefills:
            starts.append(starts[-1] + new)
            lens.append(context)
        tokens, blocks = starts[-1], MAX_BLOCKS if wide_table else -(-max(lens) // 64)
        return DSAMetadata(
            num_tokens=tokens,
            num_decodes=len(decodes),
            decode_query_len=1,
            max_decode_context_len=max(decodes, default=0),
            prefill_chunks=split_prefill(starts, lens, len(decodes), WORKSPACE_BYTES),
            request_ids=self.request_ids[:tokens],
            context_lens=self.context_lens[:tokens],
            block_table=self.table[: len(lens), :blocks].contiguous(),
            slot_mapping=self.slot_mapping[:tokens],
            block_size=64,
            workspace_bytes=WORKSPACE_BYTES,
        )


class Layer:
    """A layer of one rank, of DeepSeek-V3.2's eight by default; its values do not matter."""

    def __init__(self, cache_dtype: torch.dtype, heads: int = HEADS) -> None:
        self.heads = heads
        fp8 = cache_dtype == torch.uint8
        table = make_cos_sin_cache(16)
        mla = attention.MLAWeights(
            softmax_scale=0.1,
            kv_norm=Norm(zeros(512), 1e-6),
            rope=Rope(table, interleaved=True),
            w_uk=zeros(heads, NOPE, 512),
            w_uv=zeros(heads, 512, V_HEAD_DIM),
        )
        indexer = attention.Indexer(
            k_norm=Norm(torch.ones(128), 1e-6, torch.zeros(128)),
            rope=Rope(table, interleaved=False),
            key_cache=torch.zeros(16, 64, 132 if fp8 else 128, dtype=cache_dtype),
        )
        latents = torch.zeros(16, 64, 656 if fp8 else 576, dtype=cache_dtype)
        self.layer = attention.Layer(mla, latents, indexer)

    def without_indexer(self) -> Layer:
        other = copy(self)
        other.layer = replace(self.layer, indexer=None)
        return other

    def warm_up(self, batch: DSAMetadata) -> None:
        warm_up.launch_all(attention.forward, self.layer, self.projections(1), batch, TOPK)

    def projections(self, tokens: int) -> attention.Projections:
        return attention.Projections(
            zeros(tokens, self.heads, NOPE + 64),
            zeros(tokens, 576),
            torch.zeros(tokens, dtype=torch.int64),
            attention.IndexProjections(
                zeros(tokens, INDEX_HEADS, 128), zeros(tokens, 128), zeros(tokens, INDEX_HEADS)
            ),
        )

    def forward(self, batch: DSAMetadata, *, reuse_selection: bool = False) -> None:
        tokens = batch.num_tokens
        attention.forward(
            self.layer,
            self.projections(tokens),
            batch,
            torch.zeros(tokens, TOPK, dtype=torch.int32),
            zeros(tokens, self.heads, V_HEAD_DIM),
            reuse_selection=reuse_selection,
        )


def shaped_like_bmm(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """W_UK's and W_UV's products take longer than all else here, and nothing reads them."""
    return left.new_empty(*left.shape[:2], right.shape[2]) if out is None else out


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)
