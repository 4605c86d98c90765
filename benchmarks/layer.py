"""The attention of one DeepSeek-V3.2 layer, DSA and dense: how each grows with the context.

    python benchmarks/layer.py [--heads 128] [--peers DIR] [--only REGEX] [--seconds 300] [--resume]
    python benchmarks/layer.py --dry-run    # tiny, on a CPU: tests the script

From the projections to the heads' outputs, all ops in one CUDA graph, as `attention.forward` runs
them for a host: decode of a batch, and a prompt's last 4096 rows. Dense MLA writes its cache and
rotates by the same ops, but attends to all of a context, whose latents it finds unquantised and
contiguous: decode absorbed, by three matrix products or by FlashMLA where --peers has it; prefill
expanded, by torch's scaled_dot_product_attention. Where a context is no longer than index_topk, DSA
has to compute the same, and is compared. A prefill is also timed in each of DSA's two forms, masked
and gathered, whose results are compared: where they cross is what `masked_is_faster` should know.
Each figure is written at once (results.py); what ends the process, --resume passes over.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmark_case import Scale
from measuring import provenance, seconds
from peers import Peers, Run, runs
from random_caches import BLOCK_SIZE
from results import UNFINISHED, Results, add_options, why
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from v32_layer import LayerPass, make_layer

from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM, ROPE_DIM
from dsa_kernels.testing import INDEX_TOPK, V32, error
from dsa_plugin.attention import sparse

CHUNK = 4096
MASKED = 8  # the masked form is timed up to so many times index_topk
TOLERANCE = 2.0**-6  # two ways of bf16 arithmetic over the same latents


def decode_by_products(_torch: Any, layer: LayerPass) -> Tensor:
    query = layer.absorbed_query() * layer.mla.softmax_scale
    weights = torch.bmm(query, layer.latents.transpose(1, 2)).softmax(-1)
    return layer.up_project(torch.bmm(weights, layer.latents[..., :KV_LORA_RANK]))


def decode_by_flash_mla(library: Any, layer: LayerPass, state: dict[str, Any]) -> Tensor:
    attended, _ = library.flash_mla_with_kvcache(
        layer.absorbed_query()[:, None],
        layer.latents.view(-1, BLOCK_SIZE, 1, LATENT_DIM),
        layer.latent_table,
        layer.metadata.context_lens,
        KV_LORA_RANK,
        state.setdefault("plan", library.get_mla_metadata()[0]),
        softmax_scale=layer.mla.softmax_scale,
    )
    return layer.up_project(attended[:, 0])


def prefill_by_sdpa(_torch: Any, layer: LayerPass) -> Tensor:
    q = torch.cat(layer.dense_query(), -1).transpose(0, 1)
    latent, k_pe = layer.latents[0].split([KV_LORA_RANK, ROPE_DIM], -1)
    k_nope = latent @ layer.mla.w_uk.transpose(1, 2)
    k = torch.cat((k_nope, k_pe.expand(len(k_nope), -1, -1)), -1)
    out = scaled_dot_product_attention(
        q[None],
        k[None],
        (latent @ layer.mla.w_uv)[None],
        attn_mask=causal_lower_right(q.shape[1], k.shape[1]),
        scale=layer.mla.softmax_scale,
    )
    return out[0].transpose(0, 1)


def prefill_in_form(_torch: Any, layer: LayerPass, masked: bool) -> Tensor:
    with patch.object(sparse, "masked_is_faster", lambda *_args, **_kwargs: masked):
        return layer.dsa()


@dataclass(frozen=True)
class Shape:
    """`rows` queries of each request, the last of `context` tokens; one row is decode."""

    requests: int
    rows: int
    context: int

    @property
    def name(self) -> str:
        step = f"{self.rows} rows of" if self.rows > 1 else f"decode of {self.requests} x"
        return f"{step} {self.context}"


def shapes(tiny: bool) -> list[Shape]:
    """Those of 8K, 32K and 128K first."""
    kilo = (8, 32, 128, 1, 2, 4, 16, 64)
    contexts = (64, 192) if tiny else tuple(each << 10 for each in kilo)
    return [
        shape
        for context in contexts
        for shape in (
            *(Shape(requests, 1, context) for requests in ((1, 2) if tiny else (1, 8, 32))),
            Shape(1, min(16 if tiny else CHUNK, context), context),
        )
    ]


def measure(
    case: str, shape: Shape, scale: Scale, heads: int, topk: int, results: Results
) -> dict[str, Any]:
    """One point of the curves; in place of a time may stand why there is none."""
    sizes = (heads, topk, shape.requests, shape.rows, shape.context)
    layers = [make_layer(scale.device, *sizes)]
    nbytes = sum(each.nbytes for each in (layers[0].layer.latent_cache, layers[0].mla.w_uk))
    while len(layers) < scale.copies(nbytes):
        layers.append(make_layer(scale.device, *sizes))
    expected = layers[0].dsa().clone()
    row = {"case": case, "heads": heads, **asdict(shape), "rms_difference": {}, "ms": {}}
    for form, calls in forms(shape, scale, topk, layers).items():
        if isinstance(calls, str):
            row["ms"][form] = calls
            continue
        row["ms"][form] = UNFINISHED
        results.add_unfinished(row)
        try:
            if shape.context <= topk or form.startswith("dsa"):
                row["rms_difference"][form] = error(calls[0](), expected).rms
            row["ms"][form] = 1e3 * seconds(calls, scale.device)
        except Exception as failure:  # noqa: BLE001 (a library's, or no memory)
            row["ms"][form] = why(failure)
    return row


def forms(
    shape: Shape, scale: Scale, topk: int, layers: list[LayerPass]
) -> dict[str, list[Run] | str]:
    """The ways to compute it, on each copy of the layer."""
    copies = [(layer,) for layer in layers]
    dsa = {"dsa": runs(None, lambda _, layer: layer.dsa(), copies)}
    if shape.rows == 1:
        library = scale.peers.module("vllm.third_party.flashmla.flash_mla_interface")
        return {
            **dsa,
            "dense, matrix products": runs(None, decode_by_products, copies),
            "dense, FlashMLA": runs(library, partial(decode_by_flash_mla, state={}), copies),
        }
    dsa["dsa, gathered"] = runs(None, partial(prefill_in_form, masked=False), copies)
    if shape.context <= MASKED * topk:
        dsa["dsa, masked"] = runs(None, partial(prefill_in_form, masked=True), copies)
    return {**dsa, "dense, SDPA": runs(None, prefill_by_sdpa, copies)}


def main() -> int:
    parser = argparse.ArgumentParser(description="The attention of one layer, DSA and dense.")
    parser.add_argument(
        "--heads",
        type=int,
        default=V32.num_attention_heads,
        help="a rank's; TP8 has 16 of V3.2's 128",
    )
    parser.add_argument("--peers", type=Path, nargs="+", default=[], help="as kernels.py has it")
    add_options(parser)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU found; --dry-run runs tiny shapes on a CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    scale = Scale(device, options.dry_run, Peers(tuple(options.peers)))
    heads, topk = (4, 64) if scale.tiny else (options.heads, INDEX_TOPK)
    head = provenance(device) | {"peers": scale.peers.versions(), "index_topk": topk}
    results = Results("layer", head, options)
    for shape in shapes(scale.tiny):
        case = f"{shape.name}, {heads} heads"
        if not results.wants(case):
            continue
        results.add_unfinished({"case": case, "failed": UNFINISHED})
        try:
            row = measure(case, shape, scale, heads, topk, results)
        except Exception as failure:  # noqa: BLE001 (no memory, or a kernel's fault)
            row = {"case": case, "failed": why(failure)}
        results.add(row)
        print(json.dumps(row), flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises where a fault has ended the GPU's context
    differences = [each for row in results.rows for each in row.get("rms_difference", {}).values()]
    failed = any(each > TOLERANCE for each in differences)
    if failed:
        print(f"A result differs from DSA's by more than {TOLERANCE:.2g}.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
