"""The sizes of a trainable model, read from a config.json and written into one."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsa_kernels.dims import CONFIG_SIZES


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of a DSA model, by the names that config.json gives them."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_topk: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 16384
    rope_scaling: Mapping[str, Any] | None = None
    first_k_dense_replace: int = 0
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSizes":
        """The sizes that a config.json gives.

        Raises:
            ValueError: something that this model, or the kernels that will serve it, cannot have.
        """
        for key, allowed in (*CONFIG_SIZES.items(), *_ALLOWED.items()):
            if config.get(key, allowed) != allowed:
                raise ValueError(
                    f"{key} is {config[key]!r} in config.json; it can be {allowed!r} alone: "
                    "take a DeepSeek-V3-shaped model that has it"
                )
        theta, scaling = read_rope(config)
        given = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        given["rope_theta"] = cls.rope_theta if theta is None else theta
        given["rope_scaling"] = scaling
        missing = [f.name for f in fields(cls) if f.name in _REQUIRED and f.name not in given]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}; is it a DeepSeek-V3 model's?"
            )
        return cls(**given)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts instead of one MLP."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @property
    def softmax_scale(self) -> float:
        """Of attention's logits; YaRN sharpens them."""
        return float(self.qk_head_dim**-0.5 * yarn_mscale(self.rope_scaling) ** 2)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query's and a key's head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)


def read_rope(config: Mapping[str, Any]) -> tuple[float | None, Mapping[str, Any] | None]:
    """What config.json says of RoPE: theta, None where it does not, and YaRN's numbers, if any.

    Raises:
        ValueError: it is scaled in another way than YaRN's.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"config.json scales RoPE by {kind!r}; it can be yarn or not scaled")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return theta, rope if kind == "yarn" else None


def yarn_mscale(scaling: Mapping[str, Any] | None) -> float:
    """By how much YaRN's numbers in config.json lengthen queries, and keys likewise."""
    if not scaling or not scaling.get("mscale_all_dim") or scaling["factor"] <= 1:
        return 1.0
    return float(0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0)


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
# Keys of config.json of which this model knows one value, where they are given.
_ALLOWED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "quantization_config": None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
