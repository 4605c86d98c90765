"""SGLang's flags and variables that the plugin does not serve, whatever the model.

A place starts with `view`, the arguments as resolved so far, or `given`, as the user wrote them,
where SGLang fills in what nobody asked for.
"""

from __future__ import annotations

from typing import Any

from dsa_plugin.hosts.refusal import Refused

_COPIES = "SGLang copies caches by kernels of its GPU builds, which were not run with the plugin"
_SPLITS = "how attention splits a row's sum depends on the batch"


def _own_kernel(name: str, *, unset: Any = None, example: str = "") -> Refused:
    """A choice among SGLang's own kernels; `unset`: its value where nobody asked."""
    return Refused(
        name,
        "it chooses among SGLang's own kernels",
        f"given.{name[2:].replace('-', '_')}",
        served=(None, unset),
        example=example,
        instead="drop the flag, or set DSA_PLUGIN=off to use them",
    )


REFUSED = (
    Refused(
        "--dcp-size",
        "each rank keeps whole contexts",
        "view.dcp_size",
        served=(None, 1),
        example="2",
        instead="use --dcp-size 1 and more tensor or data parallelism",
    ),
    Refused(
        "--attn-cp-size",
        "each rank keeps whole contexts",
        "view.attn_cp_size",
        served=(None, 1),
        example="2",
        instead="use --attn-cp-size 1 and more tensor or data parallelism",
    ),
    Refused(
        "--enable-prefill-cp",
        "each rank keeps whole contexts",
        "view.enable_prefill_cp",
        instead="drop the flag, and use more tensor or data parallelism",
    ),
    Refused(
        "--enable-dsa-cache-layer-split",
        "each rank keeps the caches of all of its layers",
        "view.enable_dsa_cache_layer_split",
    ),
    Refused(
        "--enable-kv-cache-sharding",
        "each rank keeps whole contexts",
        "view.enable_kv_cache_sharding",
    ),
    Refused(
        "--enable-cp-decode-attn-tp",
        "the absorbed weights are not sharded again for decode",
        "view.enable_cp_decode_attn_tp",
    ),
    Refused(
        "--enable-layernorm-sp",
        "attention takes whole sequences, not their parts",
        "given.enable_layernorm_sp",
    ),
    Refused(
        "--enable-attn-tp-input-scattered",
        "attention takes whole inputs, not their parts",
        "given.enable_attn_tp_input_scattered",
    ),
    Refused(
        "--enable-two-batch-overlap",
        "the host does not hand selections on between overlapped batches",
        "view.enable_two_batch_overlap",
    ),
    Refused(
        "--enable-single-batch-overlap",
        "it is not tested with the plugin",
        "view.enable_single_batch_overlap",
    ),
    Refused(
        "--enable-pdmux",
        "prefill and decode share one set of metadata",
        "view.enable_pdmux",
    ),
    Refused(
        "--enable-lora",
        "adapters of kv_b_proj do not reach the absorbed weights",
        "view.enable_lora",
    ),
    Refused(
        "--lora-paths",
        "adapters of kv_b_proj do not reach the absorbed weights",
        "view.lora_paths",
        served=(None, []),
        example="a=b",
    ),
    Refused(
        "--uno-lora-path",
        "adapters of kv_b_proj do not reach the absorbed weights",
        "given.uno_lora_path",
        example="/adapter",
    ),
    Refused(
        "--enable-nvidia-megakernel",
        "it runs whole layers, attention included",
        "view.enable_nvidia_megakernel",
    ),
    Refused(
        "--enable-amd-monokernel",
        "it runs whole layers, attention included",
        "view.enable_amd_monokernel",
    ),
    Refused(
        "--enable-torch-compile",
        "the plugin's attention is not compiled",
        "view.enable_torch_compile",
    ),
    Refused(
        "--enable-multi-layer-eagle",
        "the draft is the model's own MTP layer",
        "view.enable_multi_layer_eagle",
    ),
    Refused(
        "--enable-unified-memory",
        "caches lie in the host's pool of 64-token pages",
        "view.enable_unified_memory",
    ),
    Refused(
        "--enable-page-major-kv-layout",
        "caches lie in the host's pool of 64-token pages",
        "view.enable_page_major_kv_layout",
    ),
    Refused(
        "--enable-hisparse",
        "the plugin selects from what lies on the device",
        "view.enable_hisparse",
    ),
    Refused(
        "--enable-hierarchical-cache",
        _COPIES,
        "view.enable_hierarchical_cache",
    ),
    Refused(
        "--enable-unified-cache-external-linker",
        _COPIES,
        "view.enable_unified_cache_external_linker",
    ),
    Refused(
        "--enable-lmcache",
        _COPIES,
        "view.enable_lmcache",
    ),
    Refused(
        "--enable-flexkv",
        _COPIES,
        "view.enable_flexkv",
    ),
    Refused(
        "--radix-cache-backend",
        _COPIES,
        "given.radix_cache_backend",
        example="lmcache",
    ),
    Refused(
        "--disaggregation-mode",
        _COPIES,
        "view.disaggregation_mode",
        served=("null",),
        example="prefill",
        instead="use --disaggregation-mode null",
    ),
    Refused(
        "--enable-pd-role-switch",
        _COPIES,
        "given.enable_pd_role_switch",
    ),
    Refused(
        "--decoupled-spec-role",
        "the draft is the model's own MTP layer",
        "given.decoupled_spec_role",
        served=(None, "null"),
        example="verifier",
    ),
    Refused(
        "--prefill-only-disable-kv-cache",
        "attention reads what it has cached",
        "given.prefill_only_disable_kv_cache",
    ),
    Refused(
        "--kv-canary",
        "it checks pools of another layout",
        "given.kv_canary",
        served=(None, "none"),
        example="log",
    ),
    Refused(
        "--prefill-kv-cache-dequant-dtype",
        "fp8 latents are decoded as they are read",
        "given.prefill_kv_cache_dequant_dtype",
        served=(None, "auto"),
        example="fp8_e4m3",
    ),
    Refused(
        "--cpu-offload-gb",
        "weights derived from kv_b_proj are not kept where the host keeps offloaded ones",
        "given.cpu_offload_gb",
        served=(None, 0),
        example="1",
    ),
    Refused(
        "--offload-group-size",
        "weights derived from kv_b_proj are not kept where the host keeps offloaded ones",
        "given.offload_group_size",
        served=(None, -1),
        example="2",
    ),
    Refused(
        "--enable-memory-saver",
        "weights derived from kv_b_proj are not tested to follow new ones",
        "given.enable_memory_saver",
    ),
    Refused(
        "--weight-cache-mode",
        "weights derived from kv_b_proj are not tested to follow new ones",
        "given.weight_cache_mode",
        served=(None, "off"),
        example="client",
    ),
    Refused(
        "--elastic-ep-backend",
        "ranks that join are not tested",
        "given.elastic_ep_backend",
        served=(None, "none"),
        example="mooncake",
    ),
    Refused(
        "--enable-deterministic-inference",
        _SPLITS,
        "view.enable_deterministic_inference",
    ),
    Refused(
        "--rl-on-policy-target",
        f"it wants deterministic inference, and {_SPLITS}",
        "given.rl_on_policy_target",
        example="fsdp",
    ),
    Refused(
        "--model-impl",
        "the plugin's model is an SGLang one",
        "given.model_impl",
        served=(None, "auto", "sglang"),
        example="transformers",
    ),
    Refused(
        "--load-format",
        "it is not tested with the indexer's weights",
        "given.load_format",
        served=(None, "auto", "safetensors", "pt", "npcache", "mistral", "dummy", "layered"),
        example="runai_streamer",
        instead="use --load-format auto",
    ),
    Refused(
        "--custom-weight-loader",
        "it is not tested with the indexer's weights",
        "given.custom_weight_loader",
        served=(None, []),
        example="theirs.load",
    ),
    Refused(
        "--enable-deepseek-v4-fp4-indexer",
        "DSA_INDEX_CACHE_DTYPE says how index keys are cached",
        "given.enable_deepseek_v4_fp4_indexer",
    ),
    Refused(
        "--speculative-algorithm",
        "the plugin drafts with the model's own MTP layer",
        "given.speculative_algorithm",
        served=(None, "NEXTN", "EAGLE"),
        example="NGRAM",
        instead="use NEXTN or EAGLE",
    ),
    Refused(
        "--speculative-eagle-topk",
        "a row sees every position before its own, so drafts must be chains",
        "given.speculative_eagle_topk",
        served=(None, 1),
        example="2",
        instead="use --speculative-eagle-topk 1",
    ),
    Refused(
        "--speculative-draft-kv-cache-dtype",
        "target and draft keep their latents in one dtype",
        "given.speculative_draft_kv_cache_dtype",
        example="fp8_e4m3",
    ),
    _own_kernel("--dsa-prefill-backend", example="fa3"),
    _own_kernel("--dsa-decode-backend", example="fa3"),
    _own_kernel("--dsa-topk-backend", unset="sgl-kernel", example="torch"),
    _own_kernel("--dsa-paged-mqa-logits-backend", unset="auto", example="deepgemm"),
    _own_kernel("--speculative-dsa-topk-backend", unset="sgl-kernel", example="torch"),
    _own_kernel("--dsa-triton-union", unset=0, example="2"),
    _own_kernel("--enable-dsa-fused-indexer", unset=False),
    Refused(
        "SGLANG_ENABLE_DETERMINISTIC_INFERENCE",
        _SPLITS,
        served=("", "0", "false", "False"),
        example="1",
        instead="unset it",
    ),
    Refused(
        "SGLANG_DSA_TOPK_BROADCAST",
        "the plugin's ranks each select, and select alike",
        served=("", "0", "false", "False"),
        example="1",
        instead="unset it",
    ),
    Refused(
        "SGLANG_ENABLE_TORCH_COMPILE",
        "the plugin's attention is not compiled",
        served=("", "0", "false", "False"),
        example="1",
        instead="unset it",
    ),
)
