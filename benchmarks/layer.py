"""The attention of one DeepSeek-V3.2 layer, DSA and dense: how each grows with the context.

    python benchmarks/layer.py [--heads 128] [--peers DIR]
    python benchmarks/layer.py --dry-run    # tiny, on a CPU: tests the script

From the projections to the heads' outputs, all ops in one CUDA graph, as `attention.forward` runs
them for a host: decode of a batch, and a prompt's last 4096 rows. Dense MLA writes its cache and
rotates by the same ops, but attends to all of a context, whose latents it finds unquantised and
contiguous: decode absorbed, by three matrix products or by FlashMLA where --peers has it; prefill
expanded, by torch's scaled_dot_product_attention. Where a context is no longer than index_topk, DSA
has to compute the same, and is compared. A prefill is also timed in each of DSA's two forms, masked
and gathered, whose results are compared: where they cross is what `masked_is_faster` should know.
Writes layer.json and layer.png beside this file, or into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmark_case import Scale
from measuring import provenance, seconds, version
from peers import Peers, runs
from random_caches import BLOCK_SIZE
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


def measure(
    scale: Scale, heads: int, topk: int, requests: int, rows: int, context: int
) -> dict[str, Any]:
    """One point of the curves; in place of a time may stand why there is none."""
    layers = [make_layer(scale.device, heads, topk, requests, rows, context)]
    nbytes = sum(each.nbytes for each in (layers[0].layer.latent_cache, layers[0].mla.w_uk))
    while len(layers) < scale.copies(nbytes):
        layers.append(make_layer(scale.device, heads, topk, requests, rows, context))
    copies = [(layer,) for layer in layers]
    forms = {"dsa": runs(None, lambda _, layer: layer.dsa(), copies)}
    if rows == 1:
        library = scale.peers.module("vllm.third_party.flashmla.flash_mla_interface")
        forms["dense, matrix products"] = runs(None, decode_by_products, copies)
        flash_mla = partial(decode_by_flash_mla, state={})
        forms["dense, FlashMLA"] = runs(library, flash_mla, copies)
    else:
        forms["dense, SDPA"] = runs(None, prefill_by_sdpa, copies)
        forms["dsa, gathered"] = runs(None, partial(prefill_in_form, masked=False), copies)
        if context <= MASKED * topk:
            forms["dsa, masked"] = runs(None, partial(prefill_in_form, masked=True), copies)

    point: dict[str, Any] = {"requests": requests, "rows": rows, "context": context}
    point["ms"] = dict[str, float | str]()
    expected = layers[0].dsa().clone()
    for name, calls in forms.items():
        if isinstance(calls, str):
            point["ms"][name] = calls
            continue
        try:
            if context <= topk or name.startswith("dsa"):
                difference = error(calls[0](), expected).rms
                point.setdefault("rms_difference", {})[name] = difference
            point["ms"][name] = 1e3 * seconds(calls, scale.device)
        except Exception as failure:  # noqa: BLE001 (a library's, or no memory)
            point["ms"][name] = f"{type(failure).__name__}: {failure}"
    return point


def shapes(tiny: bool) -> Iterator[tuple[int, int, int]]:
    """(requests, rows of each, context); one row is decode."""
    contexts = (64, 192) if tiny else tuple(1 << bits for bits in range(10, 18))
    for context in contexts:
        for requests in (1, 2) if tiny else (1, 8, 32):
            yield requests, 1, context
        yield 1, min(16 if tiny else CHUNK, context), context


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against context: a curve for each form and batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5))
    curves: dict[tuple[bool, str, int], list[tuple[int, float]]] = {}
    for point in result["points"]:
        for form, ms in point["ms"].items():
            if not isinstance(ms, str):
                key = (point["rows"] > 1, form, point["requests"])
                curves.setdefault(key, []).append((point["context"], ms))
    for (prefill, form, requests), points in curves.items():
        label = form if prefill else f"{form}, batch {requests}"
        style = "o-" if form.startswith("dsa") else "x--"
        panels[int(prefill)].loglog(*zip(*points, strict=True), style, label=label)
    for panel, title in zip(panels, ("decode", f"last {CHUNK} tokens of a prompt"), strict=True):
        panel.set(xlabel="context, tokens", ylabel="ms a layer", title=title)
        panel.set_xscale("log", base=2)
        panel.grid(True, alpha=0.3)
        panel.legend()
    figure.suptitle(f"{result['heads']} heads; {result['device']}; {result['date']}")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description="The attention of one layer, DSA and dense.")
    parser.add_argument(
        "--heads",
        type=int,
        default=V32.num_attention_heads,
        help="a rank's; TP8 has 16 of V3.2's 128",
    )
    parser.add_argument("--peers", type=Path, nargs="+", default=[], help="as kernels.py has it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU found; --dry-run runs tiny shapes on a CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    scale = Scale(device, options.dry_run, Peers(tuple(options.peers)))
    heads, topk = (4, 64) if scale.tiny else (options.heads, INDEX_TOPK)
    result: dict[str, Any] = {**provenance(device), "heads": heads, "index_topk": topk}
    result["points"] = []
    failed = False
    for shape in shapes(scale.tiny):
        point = measure(scale, heads, topk, *shape)
        result["points"].append(point)
        print(json.dumps(point), flush=True)
        failed |= any(each > TOLERANCE for each in point.get("rms_difference", {}).values())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "layer.json").write_text(json.dumps(result, indent=1) + "\n")
    if version("matplotlib") == "absent":
        print("matplotlib is absent: no layer.png")
    else:
        plot(result, options.out / "layer.png")
    if failed:
        print(f"A result differs from DSA's by more than {TOLERANCE:.2g}.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
