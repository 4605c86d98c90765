"""Triton kernel of cache_write: one, each of whose programs does a part of one op.

A token brings little work, and a launch takes some microseconds however little it does: what
`one_launch` holds together is one launch.

Values are rounded to the input's dtype after each step, as the reference does. e4m3 is written by
integer arithmetic, the same on every chip: half of them have no such conversion.
"""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.cache_write.device import rotate_heads, write_keys, write_latent
from dsa_kernels.cache_write.one_launch import Job, submit
from dsa_kernels.dims import (
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    LATENT_DIM,
    LATENT_FP8_BYTES,
    ROPE_DIM,
)
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.norm_and_rope import Norm, Rope
from dsa_kernels.tuning import LaunchConfig

_ROPE = tl.constexpr(ROPE_DIM)
_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)


def latent_cache_write(
    kv: Tensor, norm: Norm, rope: Rope, positions: Tensor, cache: Tensor, slot_mapping: Tensor
) -> None:
    """As the public function."""
    arch = arch_of(kv.device)
    submit(latent_job(kv, norm, rope, positions, cache, slot_mapping), arch, run)


def index_cache_write(
    k: Tensor,
    norm: Norm,
    rope: Rope,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    hadamard: bool,
) -> None:
    """As the public function."""
    arch = arch_of(k.device)
    submit(key_job(k, norm, rope, positions, cache, slot_mapping, hadamard, arch), arch, run)


def index_query(
    q: Tensor,
    weights: Tensor,
    rope: Rope,
    positions: Tensor,
    hadamard: bool,
    out: Tensor,
    out_weights: Tensor,
) -> None:
    """As the public function, into `out`, in fp8 if that is, and `out_weights`."""
    arch, scaled = arch_of(q.device), (weights, out_weights)
    submit(query_job(q, rope, positions, out, arch, hadamard=hadamard, scaled=scaled), arch, run)


def apply_rope(x: Tensor, rope: Rope, positions: Tensor, out: Tensor) -> None:
    """As the public function, into `out`; both are [T, heads, 64]."""
    arch = arch_of(x.device)
    submit(query_job(x, rope, positions, out, arch), arch, run)


def run(jobs: Sequence[Job], arch: Arch) -> None:
    for launch in launches(jobs, arch):
        launch.run()


def launches(jobs: Sequence[Job], arch: Arch) -> list[Launch]:
    """Of each op one job at most; none may wait for another."""
    arguments: dict[str, Any] = dict.fromkeys(_write.arg_names)
    config = _config(arch)
    for block in config.blocks:
        del arguments[block]
    for job in jobs:
        arguments[f"{job.name}_programs"] = job.programs
        arguments |= {f"{job.name}_{name}": value for name, value in job.arguments.items()}
    programs = sum(job.programs for job in jobs)
    return [Launch(_write, (programs,), arguments, config)] if programs else []


def latent_job(
    kv: Tensor, norm: Norm, rope: Rope, positions: Tensor, cache: Tensor, slot_mapping: Tensor
) -> Job:
    arguments = {
        "x": kv,
        "norm_weight": norm.weight.contiguous(),
        "eps": norm.eps,
        **_rotation(rope, positions),
        **_destination(cache, slot_mapping),
        **strides("x", kv, "td"),
    }
    return Job("latent", kv.shape[0], arguments)


def key_job(
    k: Tensor,
    norm: Norm,
    rope: Rope,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    hadamard: bool,
    arch: Arch,
) -> Job:
    assert norm.bias is not None
    tokens = k.shape[0]
    arguments = {
        "x": k,
        "norm_weight": norm.weight.contiguous(),
        "norm_bias": norm.bias.contiguous(),
        "eps": norm.eps,
        **_rotation(rope, positions),
        **_destination(cache, slot_mapping),
        "tokens": tokens,
        **strides("x", k, "td"),
        "INTERLEAVED": rope.interleaved,
        "HADAMARD": hadamard,
    }
    return Job("key", triton.cdiv(tokens, _config(arch).blocks["BLOCK_TOKENS"]), arguments)


def query_job(
    x: Tensor,
    rope: Rope,
    positions: Tensor,
    out: Tensor,
    arch: Arch,
    *,
    hadamard: bool = False,
    scaled: tuple[Tensor, Tensor] | None = None,
) -> Job:
    """`scaled`: the indexer's head weights, and where they go once multiplied; else only RoPE."""
    tokens, heads, _ = x.shape
    fp8 = out.dtype == torch.float8_e4m3fn
    arguments = {
        "x": x,
        **_rotation(rope, positions),
        "out": out.view(torch.uint8) if fp8 else out,
        "heads": heads,
        **strides("x", x, "thd"),
        **strides("out", out, "thd"),
        "INTERLEAVED": rope.interleaved,
    }
    if scaled is not None:
        weights, out_weights = scaled
        arguments |= {
            "weights": weights,
            "factor": heads**-0.5 * INDEX_HEAD_DIM**-0.5,
            "out_weights": out_weights,
            **strides("weights", weights, "th"),
            "HADAMARD": hadamard,
            "FP8": fp8,
        }
    groups = triton.cdiv(heads, _config(arch).blocks["BLOCK_HEADS"])
    return Job("rope" if scaled is None else "query", tokens * groups, arguments)


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """What layers with and without an indexer launch, and RoPE alone, in each precision."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = 64
    position, table = meta(tokens, dtype=torch.int64), meta(4096, ROPE_DIM)
    rms, layer = Norm(meta(KV_LORA_RANK), 1e-6), Norm(meta(128), 1e-6, meta(128))
    pairs, halves = Rope(table, interleaved=True), Rope(table, interleaved=False)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q = meta(tokens, 64, INDEX_HEAD_DIM, dtype=dtype)
        kv, k = meta(tokens, LATENT_DIM, dtype=dtype), meta(tokens, INDEX_HEAD_DIM, dtype=dtype)
        q_pe = q[..., :ROPE_DIM]
        scaled = (meta(tokens, 64, dtype=dtype), meta(tokens, 64))
        rotate = query_job(q_pe, pairs, position, q_pe, arch)
        (launch,) = launches([rotate], arch)
        name = str(dtype).removeprefix("torch.")
        yield f"rope {name}", launch
        for fp8 in (True, False):
            stored = torch.uint8 if fp8 else dtype
            latents = meta(8, 64, LATENT_FP8_BYTES if fp8 else LATENT_DIM, dtype=stored)
            keys = meta(8, 64, INDEX_FP8_BYTES if fp8 else INDEX_HEAD_DIM, dtype=stored)
            out = torch.empty_like(q, dtype=torch.float8_e4m3fn if fp8 else dtype)
            rope = halves if fp8 else pairs
            latent = latent_job(kv, rms, pairs, position, latents, position)
            key = key_job(k, layer, rope, position, keys, position, fp8, arch)
            query = query_job(q, rope, position, out, arch, hadamard=fp8, scaled=scaled)
            for what, jobs in {
                "all": [latent, key, query, rotate],
                "latents, keys": [latent, key, rotate],
                "latents": [latent, rotate],
            }.items():
                (launch,) = launches(jobs, arch)
                yield f"{what} {name} to {'fp8' if fp8 else 'same'}", launch


def _config(arch: Arch) -> LaunchConfig:
    return launch_config("cache_write", arch, "write")


def _rotation(rope: Rope, positions: Tensor) -> dict[str, Any]:
    return {
        "positions": positions.contiguous(),
        "cos_sin": rope.cos_sin_cache,
        **strides("cos_sin", rope.cos_sin_cache, "pd"),
    }


def _destination(cache: Tensor, slot_mapping: Tensor) -> dict[str, Any]:
    blocks, block_size, _ = cache.shape
    return {
        "cache": cache,
        "slot_mapping": slot_mapping.contiguous(),
        "num_slots": blocks * block_size,
        **strides("cache", cache, "bt"),
        "BLOCK_SIZE": block_size,
        "FP8": cache.dtype == torch.uint8,
    }


@triton.jit(
    do_not_specialize=[
        *("latent_programs", "key_programs", "query_programs", "rope_programs"),
        *("latent_positions", "key_positions", "query_positions", "rope_positions"),
        *("latent_slot_mapping", "key_slot_mapping", "latent_num_slots", "key_num_slots"),
        "key_tokens",
    ]
)
def _write(
    latent_programs,
    latent_x,
    latent_norm_weight,
    latent_eps,
    latent_positions,
    latent_cos_sin,
    latent_cache,
    latent_slot_mapping,
    latent_num_slots,
    latent_x_t,
    latent_x_d,
    latent_cos_sin_p,
    latent_cos_sin_d,
    latent_cache_b,
    latent_cache_t,
    key_programs,
    key_x,
    key_norm_weight,
    key_norm_bias,
    key_eps,
    key_positions,
    key_cos_sin,
    key_cache,
    key_slot_mapping,
    key_num_slots,
    key_tokens,
    key_x_t,
    key_x_d,
    key_cos_sin_p,
    key_cos_sin_d,
    key_cache_b,
    key_cache_t,
    query_programs,
    query_x,
    query_weights,
    query_factor,
    query_positions,
    query_cos_sin,
    query_out,
    query_out_weights,
    query_heads,
    query_x_t,
    query_x_h,
    query_x_d,
    query_weights_t,
    query_weights_h,
    query_cos_sin_p,
    query_cos_sin_d,
    query_out_t,
    query_out_h,
    query_out_d,
    rope_programs,
    rope_x,
    rope_positions,
    rope_cos_sin,
    rope_out,
    rope_heads,
    rope_x_t,
    rope_x_h,
    rope_x_d,
    rope_cos_sin_p,
    rope_cos_sin_d,
    rope_out_t,
    rope_out_h,
    rope_out_d,
    latent_BLOCK_SIZE: tl.constexpr,
    latent_FP8: tl.constexpr,
    key_INTERLEAVED: tl.constexpr,
    key_HADAMARD: tl.constexpr,
    key_BLOCK_SIZE: tl.constexpr,
    key_FP8: tl.constexpr,
    query_INTERLEAVED: tl.constexpr,
    query_HADAMARD: tl.constexpr,
    query_FP8: tl.constexpr,
    rope_INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """A part of one op: programs of the query come first, as they do the most."""
    program = tl.program_id(0)
    if query_x is not None:
        if program < query_programs:
            rotate_heads(
                program, query_x, query_weights, query_factor, query_positions, query_cos_sin,
                query_out, query_out_weights, query_heads, query_x_t, query_x_h, query_x_d,
                query_weights_t, query_weights_h, query_cos_sin_p, query_cos_sin_d, query_out_t,
                query_out_h, query_out_d, _HEAD_DIM, query_INTERLEAVED, query_HADAMARD, query_FP8,
                BLOCK_HEADS,
            )  # fmt: skip
        program -= query_programs
    if rope_x is not None:
        if (program >= 0) & (program < rope_programs):
            rotate_heads(
                program, rope_x, None, 1.0, rope_positions, rope_cos_sin, rope_out, None,
                rope_heads, rope_x_t, rope_x_h, rope_x_d, 0, 0, rope_cos_sin_p, rope_cos_sin_d,
                rope_out_t, rope_out_h, rope_out_d, _ROPE, rope_INTERLEAVED, False, False,
                BLOCK_HEADS,
            )  # fmt: skip
        program -= rope_programs
    if latent_x is not None:
        if (program >= 0) & (program < latent_programs):
            write_latent(
                program, latent_x, latent_norm_weight, latent_eps, latent_positions,
                latent_cos_sin, latent_cache, latent_slot_mapping, latent_num_slots, latent_x_t,
                latent_x_d, latent_cos_sin_p, latent_cos_sin_d, latent_cache_b, latent_cache_t,
                latent_BLOCK_SIZE, latent_FP8,
            )  # fmt: skip
        program -= latent_programs
    if key_x is not None:  # noqa: SIM102 (this one the compiler decides)
        if (program >= 0) & (program < key_programs):
            write_keys(
                program, key_x, key_norm_weight, key_norm_bias, key_eps, key_positions,
                key_cos_sin, key_cache, key_slot_mapping, key_num_slots, key_tokens, key_x_t,
                key_x_d, key_cos_sin_p, key_cos_sin_d, key_cache_b, key_cache_t, key_BLOCK_SIZE,
                key_INTERLEAVED, key_HADAMARD, key_FP8, BLOCK_TOKENS,
            )  # fmt: skip
