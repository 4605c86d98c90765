"""DeepSeek-V3.2-Exp, V3.2 and V3.2-Speciale: one architecture, different post-training.

Indexer RoPE is half split: DeepSeek corrected its demo on 2025-11-17; older copies interleave.
https://huggingface.co/deepseek-ai/DeepSeek-V3.2-Exp
"""

from dsa_registry.schema import Checkpoint, ModelEntry

_REPOSITORIES = (
    "deepseek-ai/DeepSeek-V3.2-Exp",
    "deepseek-ai/DeepSeek-V3.2",
    "deepseek-ai/DeepSeek-V3.2-Speciale",
)

ENTRY = ModelEntry(
    model_type="deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    mtp_architectures=("DeepseekV32MTPModel",),
    indexer_rope_interleave=False,
    mtp_repeats_vocab=True,
    message_encoding="deepseek_v32",
    checkpoints=(
        Checkpoint(
            repositories=_REPOSITORIES,
            fp8_repositories=_REPOSITORIES,
            vocab_size=129_280,
            num_hidden_layers=61,
            num_nextn_predict_layers=1,
            hidden_size=7168,
            intermediate_size=18_432,
            first_k_dense_replace=3,
            moe_intermediate_size=2048,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            index_n_heads=64,
            index_head_dim=128,
            index_topk=2048,
            rope_theta=10_000.0,
            rope_scaling_factor=40.0,
            max_position_embeddings=163_840,
        ),
    ),
)
