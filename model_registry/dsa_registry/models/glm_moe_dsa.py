"""GLM-5 to 5.3. 5.2 and 5.3 share top-k between layers (IndexShare) and between MTP steps.

Dimensions: GLM-5 report (arXiv 2602.15763), table of architectures.
Indexer RoPE is interleaved, unlike DeepSeek's: https://github.com/huggingface/transformers/pull/46842
5.3's config differs from 5.2's in quantisation and the release of transformers alone; its tensors
have 5.2's names and shapes: https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/6117
"""

from dataclasses import replace

from dsa_registry.schema import Checkpoint, ModelEntry

_GLM_5 = Checkpoint(
    repositories=("zai-org/GLM-5", "zai-org/GLM-5-FP8", "zai-org/GLM-5.1", "zai-org/GLM-5.1-FP8"),
    fp8_repositories=("zai-org/GLM-5-FP8", "zai-org/GLM-5.1-FP8"),
    vocab_size=154_880,
    num_hidden_layers=78,
    num_nextn_predict_layers=1,
    hidden_size=6144,
    intermediate_size=12_288,
    first_k_dense_replace=3,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    num_attention_heads=64,
    q_lora_rank=2048,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=2048,
    rope_theta=1_000_000.0,
    rope_scaling_factor=None,
    max_position_embeddings=202_752,
)
# Indexers in layers 0, 1, 2, 6, 10, ..., 74: 21 of 78.
_GLM_5_2 = replace(
    _GLM_5,
    repositories=("zai-org/GLM-5.2", "zai-org/GLM-5.2-FP8"),
    fp8_repositories=("zai-org/GLM-5.2-FP8",),
    rope_theta=8_000_000.0,
    max_position_embeddings=1_048_576,
    index_topk_freq=4,
    index_skip_topk_offset=3,
    index_share_for_mtp_iteration=True,
)

_GLM_5_3 = replace(
    _GLM_5_2,
    repositories=("zai-org/GLM-5.3", "zai-org/GLM-5.3-BF16"),
    fp8_repositories=("zai-org/GLM-5.3",),
)

ENTRY = ModelEntry(
    model_type="glm_moe_dsa",
    architectures=("GlmMoeDsaForCausalLM",),
    # vLLM's name for DeepSeek's MTP layers too (config/speculative.py, hf_config_override).
    mtp_architectures=("DeepseekV32MTPModel",),
    indexer_rope_interleave=True,
    mtp_repeats_vocab=False,
    message_encoding=None,
    checkpoints=(_GLM_5, _GLM_5_2, _GLM_5_3),
)
