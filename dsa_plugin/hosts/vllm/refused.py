"""vLLM's flags and variables that the plugin does not serve, whatever the model."""

from __future__ import annotations

from dsa_plugin.hosts.refusal import Refused

UNTRIED_TRANSFER = (
    "nobody has tried yet whether it moves the index keys along with the latents, without which "
    "answers to long prompts are garbage"
)
_CONTEXTS = "each rank keeps whole contexts"
_HOST_KERNELS = "it chooses among vLLM's own kernels"
_OWN = "drop the flag, or set DSA_PLUGIN=off to use them"
_MICRO_BATCHES = (
    "the micro-batches of a step share one buffer of selected tokens, which one would write before "
    "the other's layers have read theirs"
)
_OFFLOADED = "weights derived from kv_b_proj are not kept where the host keeps offloaded ones"

REFUSED = (
    Refused(
        "--decode-context-parallel-size",
        _CONTEXTS,
        "parallel_config.decode_context_parallel_size",
        (1,),
        "2",
        "use --decode-context-parallel-size 1 and more tensor or data parallelism",
    ),
    Refused(
        "--prefill-context-parallel-size",
        _CONTEXTS,
        "parallel_config.prefill_context_parallel_size",
        (1,),
        "2",
        "use --prefill-context-parallel-size 1 and more tensor or data parallelism",
    ),
    Refused(
        "--enable-dbo",
        _MICRO_BATCHES,
        "parallel_config.enable_dbo",
    ),
    Refused(
        "--ubatch-size",
        _MICRO_BATCHES,
        "parallel_config.ubatch_size",
        (0, 1),
        "2",
    ),
    Refused(
        "--enable-elastic-ep", "ranks that join are not tested", "parallel_config.enable_elastic_ep"
    ),
    Refused(
        "--attention-backend",
        "the plugin's layers bring their own",
        "attention_config.backend",
        example="FLASHMLA_SPARSE",
        instead=_OWN,
    ),
    Refused(
        "--attention-config.backend_per_kind",
        "the plugin's layers bring their own",
        "attention_config.backend_per_kind",
        ({},),
        '{"mla_attention": "FLASHMLA"}',
        _OWN,
    ),
    Refused(
        "--attention-config.hisparse_config",
        "the plugin selects from what lies on the device",
        "attention_config.hisparse_config",
        (None,),
        "{}",
    ),
    Refused(
        "--attention-config.indexer_kv_dtype",
        "DSA_INDEX_CACHE_DTYPE says how index keys are cached",
        "attention_config.indexer_kv_dtype",
        ("auto",),
        "mxfp4",
    ),
    Refused(
        "--attention-config.use_fp4_indexer_cache",
        "DSA_INDEX_CACHE_DTYPE says how index keys are cached",
        "attention_config.use_fp4_indexer_cache",
        example="true",
    ),
    Refused(
        "--attention-config.indexer_sparse_logits",
        _HOST_KERNELS,
        "attention_config.indexer_sparse_logits",
        example="true",
        instead=_OWN,
    ),
    Refused(
        "--attention-config.sparse_mla_force_mqa",
        _HOST_KERNELS,
        "attention_config.sparse_mla_force_mqa",
        example="true",
        instead=_OWN,
    ),
    Refused(
        "--attention-config.sparse_mla_prefill_workspace_factor",
        _HOST_KERNELS,
        "attention_config.sparse_mla_prefill_workspace_factor",
        example="3",
        instead="DSA_LOGITS_WORKSPACE_MB sizes the plugin's, or set DSA_PLUGIN=off",
    ),
    Refused(
        "--attention-config.use_non_causal",
        "attention is causal",
        "attention_config.use_non_causal",
        example="true",
    ),
    Refused(
        "--sparse-indexer-topk-backend",
        _HOST_KERNELS,
        "kernel_config.sparse_indexer_topk_backend",
        ("auto",),
        "per_row",
        _OWN,
    ),
    Refused(
        "--monokernel",
        "it runs whole layers, attention included",
        "kernel_config.monokernel",
    ),
    Refused(
        "--kv-offloading-size",
        UNTRIED_TRANSFER,
        "cache_config.kv_offloading_size",
        (None,),
        "1",
        "drop the flag, and use vLLM's own prefix cache",
    ),
    Refused(
        "--kv-cache-dtype-skip-layers",
        "all layers keep their latents in one dtype",
        "cache_config.kv_cache_dtype_skip_layers",
        ([],),
        "0",
    ),
    Refused(
        "--calculate-kv-scales",
        "fp8_ds_mla has a scale for each 128 values, from the values",
        "cache_config.calculate_kv_scales",
    ),
    Refused(
        "--kv-sharing-fast-prefill",
        "layers share selections, not caches",
        "cache_config.kv_sharing_fast_prefill",
    ),
    Refused(
        "--override-attention-dtype",
        "attention runs in the model's dtype",
        "model_config.override_attention_dtype",
        (None,),
        "fp8",
    ),
    Refused(
        "--model-class-overrides",
        "it would replace the plugin's model",
        "model_config.model_class_overrides",
        ({}, None),
        '{"DeepseekV32ForCausalLM": "theirs:Model"}',
    ),
    Refused(
        "--enable-sleep-mode",
        "weights derived from kv_b_proj are not tested to wake",
        "model_config.enable_sleep_mode",
    ),
    Refused("--cpu-offload-gb", _OFFLOADED, "offload_config.uva.cpu_offload_gb", (0,), "1"),
    Refused(
        "--offload-group-size",
        _OFFLOADED,
        "offload_config.prefetch.offload_group_size",
        (0,),
        "2",
    ),
    Refused(
        "--speculative-config.method",
        "the plugin drafts with the model's own MTP layer, or from the prompt",
        "speculative_config.method",
        (None, "mtp", "deepseek_mtp", "ngram"),
        "suffix",
        "use mtp or ngram",
    ),
    Refused(
        "--speculative-config.attention_backend",
        "the plugin's layers bring their own",
        "speculative_config.attention_backend",
        example="FLASHMLA_SPARSE",
    ),
    Refused(
        "--speculative-config.kv_cache_dtype",
        "target and draft keep their latents in one dtype",
        "speculative_config.kv_cache_dtype",
        example="bfloat16",
    ),
    Refused(
        "--speculative-config.parallel_drafting",
        "a row sees every position before its own, so drafts must be chains",
        "speculative_config.parallel_drafting",
        example="true",
    ),
    Refused(
        "VLLM_BATCH_INVARIANT",
        "the kernels divide a request's tokens by the shape of the batch, so that rounding depends "
        "on what else is in it",
        served=("", "0"),
        example="1",
        instead="unset it",
    ),
    Refused(
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        "the plugin's attention is a break in a breakable graph, and is captured in any other",
        served=("", "1"),
        example="0",
        instead="unset it",
    ),
)
