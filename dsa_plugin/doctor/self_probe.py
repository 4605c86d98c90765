"""Whether each op gives on this device what its specification does: `python -m` this, in seconds.

One decode row of a small fp8 model through all ops, each fed what the specification made on the
CPU. A fault of a GPU ends the process that meets it, so `kernels` starts one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from dsa_kernels import cache_write, indexer_logits, sparse_mla, topk_select
from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.cache_write import reference as cache_write_reference
from dsa_kernels.dims import INDEX_HEAD_DIM, KV_LORA_RANK, LATENT_DIM
from dsa_kernels.dispatch import use_triton
from dsa_kernels.indexer_logits import reference as indexer_reference
from dsa_kernels.launch import launch_source
from dsa_kernels.layout import index_fp8_views, latent_fp8_views
from dsa_kernels.sparse_mla import reference as mla_reference
from dsa_kernels.testing import error, make_cos_sin_cache, make_index_cache, make_latent_cache
from dsa_kernels.topk_select import reference as topk_reference
from dsa_kernels.tuning.base import BASE
from dsa_plugin.probe.host_kernel import Op
from dsa_plugin.probe.our_kernels import our_kernels

_PREFIX = "probe: "
_SECONDS = 300  # Triton compiles each kernel
_KEYS, _HEADS, _TOPK, _PAGE = 200, 16, 64, 64
# bf16 rounds by up to 1/256, and sums of rounded products are no farther off.
_TOLERANCE = 1e-2


def kernels(environ: Mapping[str, str]) -> dict[str, Any]:
    """What runs each op here, where its launch came from, and whether its result is right.

    Args:
        environ: of the process that runs them: DSA_KERNELS says what.

    Returns:
        `forms` with latents in bf16 and in fp8, `tuning` of a GPU, and `probe`: each op's `ok` and
        `text`, the last of which is how the process ended where it did not live to ask all.
    """
    command = [sys.executable, "-P", "-m", "dsa_plugin.doctor.self_probe"]
    found: dict[str, Any] = {}
    probe: list[dict[str, Any]] = []
    try:
        done = subprocess.run(
            command,
            env=dict(environ),
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return found | {"error": f"no answer after {_SECONDS} s"}
    for line in done.stdout.splitlines():
        if line.startswith(_PREFIX):
            answer = json.loads(line.removeprefix(_PREFIX))
            if "op" in answer:
                probe.append(answer)
            else:
                found |= answer
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        probe.append({"op": "the next", "ok": False, "text": said[0]})
    return {**found, "probe": probe}


def main() -> None:
    """Print the forms, and a line for each op as soon as it is known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _write({"forms": {name: our_kernels(fp8_latents=name == "fp8") for name in ("bf16", "fp8")}})
    _write({"tuning": tuning(arch_of(device)) if use_triton(device) else "no kernels here"})
    example = Example(device)
    for op in get_args(Op):
        try:
            far = getattr(example, op)()
            _write({"op": op, "ok": far <= _TOLERANCE, "text": f"relative error {far:.1e}"})
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            text = " ".join(f"{type(error).__name__}: {error}".split())
            _write({"op": op, "ok": False, "text": text})


def tuning(arch: Arch) -> dict[str, str]:
    """Where each launch configuration of a chip came from, with the installed Triton."""
    said = {}
    for op, keys in BASE.items():
        for key in keys:
            source = launch_source(op, arch, key)
            how = "inferred from" if source.inferred else "measured on"
            where = f"{how} {source.gpu} with Triton {source.triton}" if source.gpu else "compiled"
            said[f"{op} {key}"] = where
    return said


def _write(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{_PREFIX}{json.dumps(answer)}\n")
    sys.stdout.flush()


class Example:
    """A request of 200 tokens in both caches, by the specifications; each op's relative error."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        pages = -(-_KEYS // _PAGE)
        self.kv = torch.randn(_KEYS, LATENT_DIM).bfloat16()
        self.k = torch.randn(_KEYS, INDEX_HEAD_DIM).bfloat16()
        self.positions = torch.arange(_KEYS)
        self.cos_sin = make_cos_sin_cache(_KEYS)
        self.latents = make_latent_cache(torch.uint8, pages, _PAGE)
        self.keys = make_index_cache(torch.uint8, pages, _PAGE)
        self._write(cache_write_reference, torch.device("cpu"), self.latents, self.keys)
        q = torch.randn(1, _HEADS, INDEX_HEAD_DIM).bfloat16()
        weights = torch.rand(1, _HEADS).bfloat16()
        rope = cache_write.Rope(self.cos_sin, interleaved=False)
        query = (q, weights, rope, self.positions[-1:])
        self.q, self.weights = cache_write_reference.index_query(*query, fp8=True)
        key, scale = indexer_reference.gather_index_keys(self.keys, torch.arange(pages), _KEYS)
        self.pages = torch.arange(pages, dtype=torch.int32)[None]
        self.length = torch.tensor([_KEYS], dtype=torch.int32)
        self.logits = indexer_reference.indexer_logits(
            self.q, self.weights, key, torch.zeros_like(self.length), self.length, k_scale=scale
        )
        self.indices = topk_reference.topk_select(self.logits, _TOPK, None, self.length)

    def cache_write(self) -> float:
        latents, keys = (torch.empty_like(cache) for cache in (self.latents, self.keys))
        latents, keys = latents.to(self.device), keys.to(self.device)
        self._write(cache_write, self.device, latents, keys)
        found = (*latent_fp8_views(latents.cpu()), *index_fp8_views(keys.cpu()))
        expected = (*latent_fp8_views(self.latents), *index_fp8_views(self.keys))
        # The last page is not full, and what nobody wrote is poison.
        return max(
            error(a.flatten(0, 1)[:_KEYS].float(), b.flatten(0, 1)[:_KEYS].float()).rms
            for a, b in zip(found, expected, strict=True)
        )

    def indexer_logits(self) -> float:
        given = (self.q[None], self.weights[None], self.keys, self.pages, self.length[None])
        q, weights, keys, pages, length = self._there(*given)
        found = indexer_logits.indexer_logits_paged(q, weights, keys, pages, length, _KEYS)
        return error(found.cpu(), self.logits).rms

    def topk_select(self) -> float:
        logits, length = self._there(self.logits, self.length)
        found = topk_select.topk_select(logits, _TOPK, None, length)
        return float((found.cpu() != self.indices).float().mean())

    def sparse_mla(self) -> float:
        q = torch.randn(1, _HEADS, LATENT_DIM).bfloat16()
        out = q.new_empty(1, _HEADS, KV_LORA_RANK)
        scale = LATENT_DIM**-0.5
        lse = torch.empty(1, _HEADS)
        slots = self.indices.long()
        mla_reference.sparse_mla(q, self.latents, slots, None, scale, out, lse)
        there, latents, chosen = self._there(q, self.latents, slots)
        found, _ = sparse_mla.sparse_mla(there, latents, chosen, scale)
        return error(found.cpu(), out).rms

    def _there(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device) for tensor in tensors]

    def _write(self, ops: Any, device: torch.device, latents: Tensor, keys: Tensor) -> None:
        """Both caches, by the public ops or their specification."""
        kv, k, positions, table = (
            tensor.to(device) for tensor in (self.kv, self.k, self.positions, self.cos_sin)
        )
        norm = cache_write.Norm(torch.ones(KV_LORA_RANK, device=device), 1e-6)
        rope = cache_write.Rope(table, interleaved=True)
        ops.latent_cache_write(kv, norm, rope, positions, latents, positions)
        ones = torch.ones(INDEX_HEAD_DIM, device=device)
        norm = cache_write.Norm(ones, 1e-6, torch.zeros_like(ones))
        rope = cache_write.Rope(table, interleaved=False)
        ops.index_cache_write(k, norm, rope, positions, keys, positions)


if __name__ == "__main__":
    main()
