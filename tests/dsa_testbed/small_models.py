"""The checkpoints tests and benchmarks use: config.json as the real releases write it.

Keys follow deepseek-ai/DeepSeek-V3.2 and zai-org/GLM-5 / GLM-5.2 config.json. They are written by
hand because transformers drops ``topk_method``, ``scoring_func``, ``moe_layer_freq`` and
``indexer_rope_interleave`` when it saves, and a server then routes experts differently.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Config = dict[str, Any]
Dtype = Literal["fp32", "bf16", "fp8", "fp8_dequant"]
VOCAB_SIZE = 2048
FP8_BLOCK = 128


@dataclass(frozen=True)
class SmallModel:
    """One checkpoint. ``gains`` scale the random weights (weights.py says of what)."""

    name: str
    config: Config
    dtype: Dtype = "fp32"
    seed: int = 0
    gains: dict[str, float] = field(default_factory=dict)


def _deepseek_v32() -> Config:
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 256,
        "index_head_dim": 128,
        # With few heads all ReLUs of a key are often 0 together; the scores then tie, and a tie at
        # the last selected rank makes the reference's choice arbitrary.
        "index_n_heads": 16,
        "index_topk": 64,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "kv_lora_rank": 512,
        "max_position_embeddings": 40960,
        "moe_intermediate_size": 256,
        "moe_layer_freq": 1,
        "n_group": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            # The release has 4096 (x 40 = 163840 positions); 1024 lets short prompts reach past it.
            "original_max_position_embeddings": 1024,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": VOCAB_SIZE,
    }


def _glm5() -> Config:
    config = _deepseek_v32()
    for key in ("rope_scaling", "rope_theta", "ep_size"):
        del config[key]
    return config | {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "head_dim": 64,
        "indexer_rope_interleave": True,
        "n_group": 1,
        "qk_head_dim": 256,
        "qk_nope_head_dim": 192,
        "rms_norm_eps": 1e-05,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "v_head_dim": 256,
    }


def _glm52() -> Config:
    # GLM-5.2 has 78 layers, freq 4, offset 3: F F F then S S S F repeated.
    freq, offset, layers = 3, 3, 6
    types = ["shared" if max(i - offset + 1, 0) % freq else "full" for i in range(layers)]
    return _glm5() | {
        "index_share_for_mtp_iteration": True,
        "index_skip_topk_offset": offset,
        "index_topk_freq": freq,
        "indexer_types": types,
        "num_hidden_layers": layers,
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    }


def _bench_dsa() -> Config:
    config = _deepseek_v32()
    config["rope_scaling"] = config["rope_scaling"] | {"original_max_position_embeddings": 4096}
    return config | {
        "hidden_size": 1024,
        "index_n_heads": 64,
        "index_topk": 2048,
        "intermediate_size": 2048,
        "max_position_embeddings": 163840,
        "n_group": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 512,
    }


def _bench_dense() -> Config:
    config = {k: v for k, v in _bench_dsa().items() if not k.startswith("index_")}
    return config | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}


FAMILIES: dict[str, Callable[[], Config]] = {
    "v32": _deepseek_v32,
    "glm5": _glm5,
    "glm52": _glm52,
    "bench_dsa": _bench_dsa,
    "bench_dense": _bench_dense,
}
# GLM's softmax scale has no YaRN factor (1.87 in V3.2); without this its attention is nearly even.
_GLM_GAINS = {"attention_logits": 1.6}
_GAINS = {"glm5": _GLM_GAINS, "glm52": _GLM_GAINS}
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp8", "fp8_dequant")
_TORCH_DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16", "fp8_dequant": "float32"}


def small_model(name: str, **overrides: Any) -> SmallModel:
    """The model called ``<family>`` or ``<family>-<dtype>``.

    ``overrides`` replace keys of config.json; None removes one. Without a dtype the small families
    are fp32 and the benchmark ones bf16. Values are the same in every dtype: fp32 holds numbers
    that bf16 can hold, and fp8_dequant is what fp8 means, in fp32.
    """
    family, _, dtype = name.partition("-")
    dtype = dtype or ("bf16" if family.startswith("bench") else "fp32")
    if family not in FAMILIES or dtype not in DTYPES:
        raise ValueError(
            f"unknown checkpoint {name!r}: use <family> or <family>-<dtype> with family one of "
            f"{', '.join(FAMILIES)} and dtype one of {', '.join(DTYPES)}"
        )
    config = FAMILIES[family]() | {"dtype": _TORCH_DTYPE[dtype]}
    if dtype == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    config |= overrides
    config = {key: value for key, value in config.items() if value is not None}
    return SmallModel(
        name=f"{family}-{dtype}",
        config=config,
        dtype=dtype,
        gains=_GAINS.get(family, {}),
    )
