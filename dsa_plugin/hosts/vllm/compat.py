"""What differs between vLLM 0.26 and 0.33, or has no hook: one function each.

Every function says what, why, the upstream place and when to remove it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch
import vllm
from vllm.platforms import current_platform

from dsa_plugin.hosts.replaced_names import replaced_names

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, ModelConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

ATTENTION_OP = "vllm::dsa_plugin_attention"
MTP_ARCHITECTURES = ("DeepseekV32MTPModel", "DeepSeekMTPModel")
"""Architectures of DSA drafts: the first since 0.30, the second before, shared with dense V3.

Source: config/speculative.py, SpeculativeConfig.hf_config_override. Drop the second with 0.28.
"""


def native_path() -> str | None:
    """The host's own DSA path on this device, in words; None where it has none.

    Source: supports_compute_capability of v1/attention/backends/mla/*sparse*.py (9.x, 10.x, 12.x on
    CUDA), sparse_attn_indexer.py forward_hip (AITER; gfx950 has an indexer without it, but the
    attention of rocm_aiter_mla_sparse.py imports aiter all the same), platforms/cpu.py (refuses).
    Reads NVML on CUDA, so it opens no CUDA context.
    """
    if current_platform.is_cpu():
        return None
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        if capability is not None and capability.major in (9, 10, 12):
            return f"vLLM has native DSA kernels for sm{capability.major}{capability.minor}"
        return None
    if current_platform.is_rocm():
        from vllm import envs

        return "vLLM has a native DSA path with AITER" if envs.VLLM_ROCM_USE_AITER else None
    return f"vLLM's own path is kept on {current_platform.device_type}"


def attention_classes(**classes: type) -> AbstractContextManager[None]:
    """Let the host's layers be built with our attention classes while the context is open.

    What: replaces names in deepseek_v2 (`Indexer`, `MultiHeadLatentAttentionWrapper`) that its
    constructors look up as module globals, and nothing else; they are put back on exit.
    Why: the decoder layer and the attention take no class argument, and the only other way, a copy
    of three constructors, differs in every release. Registering the wrapper as an out-of-tree
    PluggableLayer would replace it for every MLA model.
    Remove when: the host's DeepseekV2DecoderLayer takes its attention class as an argument or a
    class attribute.
    """
    # Not above: registering reads this file, in processes of other models too.
    from vllm.model_executor.models import deepseek_v2

    # With use_mla off (`leave_cpu_mla_backend`) the decoder layer asks for DeepseekV2Attention.
    classes = {"DeepseekV2Attention": deepseek_v2.DeepseekV2MLAAttention, **classes}
    return replaced_names(deepseek_v2, **classes)


def leave_cpu_mla_backend(model_config: ModelConfig) -> None:
    """Tell the CPU platform that this model does not run on its MLA backend.

    What: clears the model's is_deepseek_mla flag on CPUs.
    Why: platforms/cpu.py, check_and_update_config, forces 16-token blocks and turns chunked prefill
    and prefix caching off for every MLA model on CPUs without AMX, because of a kernel that our
    layers do not use.
    Remove when: that restriction asks the attention backend instead of the model.
    """
    if current_platform.is_cpu():
        model_config.model_arch_config.is_deepseek_mla = False


def split_at_attention(compilation: CompilationConfig) -> None:
    """Keep our attention out of the piecewise CUDA graphs of a compiled model.

    What: adds our op to those that the host splits a compiled model at.
    Why: config/compilation.py, _attention_ops, lists the host's own alone. Piecewise graphs are
    captured without a batch, so without what attention does, and would replay just that. Breakable
    graphs, with which 0.32 serves these models uncompiled on CUDA, ask the op itself.
    Remove when an op can say so where it is registered.
    """
    ops = {"_attention_ops": [*compilation._attention_ops, ATTENTION_OP]}  # of this config alone
    vars(compilation).update(ops)
    if compilation.splitting_ops:
        compilation.splitting_ops = [*compilation.splitting_ops, ATTENTION_OP]


def keep_weight_readable(linear: Any) -> None:
    """Leave a linear layer's weight as it was loaded, for whoever reads it.

    What: sets the flags that 0.30 and 0.31 gave such layers; before, drops what the layer does
    after loading.
    Why: layers/linear.py, UnquantizedLinearMethod.process_weights_after_loading, packs a weight on
    a CPU into a form that cannot be read back, and frees it.
    Remove all but the first line when 0.30 is no longer supported.
    """
    linear._cpu_skip_gemm_dispatch = True
    linear.skip_weight_relayout = True
    if current_platform.is_cpu() and vllm.__version_tuple__ < (0, 30):
        linear.quant_method.process_weights_after_loading = lambda layer: None


def cache_spec(block_size: int, head_size: int, dtype: torch.dtype, *, indexer: bool) -> Any:
    """An MLAAttentionSpec of either cache.

    Since 0.30 the spec has a `cache_role`, and since 0.32 `max_tp_shards` (the index key, like the
    latent, is not sharded by TP). Before 0.30 the host takes specs for one that differ in nothing
    but their sizes, and gives all caches the shape of the first (v1/kv_cache_interface.py, merge):
    `cache_dtype_str`, which says nothing else there, tells them apart.
    Remove when 0.28 is no longer supported.
    """
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    known = {field.name for field in fields(MLAAttentionSpec)}
    kwargs: dict[str, Any] = {}
    if indexer and "cache_role" in known:
        from vllm.v1.kv_cache_interface import SparseCacheRole

        kwargs["cache_role"] = SparseCacheRole.INDEXER
    elif indexer:
        kwargs["cache_dtype_str"] = "index_key"
    if "max_tp_shards" in known:
        kwargs["max_tp_shards"] = 1
    return MLAAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=head_size, dtype=dtype, **kwargs
    )


def host_side_seq_lens(batch: CommonAttentionMetadata) -> list[int]:
    """Context lengths as host integers: exact for prefill rows, upper bounds for decodes.

    `seq_lens_cpu_upper_bound` is the host's copy without a device read; it is
    None in some batches of the CPU runner, where reading the tensor itself is free, and 0.26 may
    leave it None on a GPU, where `seq_lens_cpu` is the documented way.
    Remove the last line with 0.26.
    """
    bound = getattr(batch, "seq_lens_cpu_upper_bound", None)
    if bound is None:
        on_cpu = batch.seq_lens.device.type == "cpu"
        bound = batch.seq_lens if on_cpu else cast(Any, batch).seq_lens_cpu
    return list(bound[: batch.num_reqs].tolist())
