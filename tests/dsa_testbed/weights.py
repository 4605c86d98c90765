"""Seeded random weights under the names of the released checkpoints.

Two aims pull apart. A wrong key, angle or selection must change the next token, so attention must
weigh in the logits. And two correct fp32 implementations must agree on every token, although now
and then rounding swaps two keys at the last rank of the selection: with attention as large as the
residual stream one swap moves the next layer's scores past their spacing, swaps more, and about one
token in a thousand changes. At a tenth of the residual stream no swap spreads (0 of 8000 tokens
changed by another chunking of the reference), while leaving out one of 64 keys still changes one
token in twenty and a dense attention one in three.
"""

import hashlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from dsa_testbed.small_models import FP8_BLOCK, Config, SmallModel

Named = tuple[str, Tensor]
Gains = dict[str, float]

NUM_SPECIAL_TOKENS = 3
DEFAULT_GAINS = {
    "attention_logits": 1.0,  # std of q.k, before the softmax scale, over sqrt(head dim)
    "attention": 0.2,  # o_proj; output is 0.1 of the residual stream
    "mlp": 0.3,
    "experts": 0.15,
    "lm_head": 4.0,  # std of the logits
    "self_avoidance": 12.0,  # taken off the logit of the token just read
    # RMSNorm of the latents undoes this gain. It makes the norm's epsilon vanish: transformers
    # fixes it at 1e-6 while servers take rms_norm_eps, which is 1e-5 in GLM.
    "latent": 10.0,
    "mtp_embedding": 1.0,
    "mtp_hidden": 0.25,
}
# As in DeepSeek-V3.2: every linear layer except the router, the indexer's head weights and the
# MTP projection.
_FP8 = re.compile(
    r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|wq_b|wk|gate_proj|up_proj|down_proj)"
    r"\.weight$"
)


def tensors(model: SmallModel) -> Iterator[Named]:
    """Every tensor of the checkpoint, in the dtype it is stored in."""
    for name, value in _values(model):
        if name.endswith("e_score_correction_bias"):
            yield name, value
        elif model.dtype == "fp32":
            yield name, value.bfloat16().float()
        elif model.dtype == "bf16" or not _FP8.search(name):
            value = value.bfloat16()
            yield name, value.float() if model.dtype == "fp8_dequant" else value
        else:
            quantised, scale = quantise_blocks(value.bfloat16().float())
            if model.dtype == "fp8":
                yield name, quantised
                yield name + "_scale_inv", scale
            else:
                yield name, dequantise_blocks(quantised, scale)


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> e4m3 [N, K] and fp32 scales [ceil(N/128), ceil(K/128)], powers of two (ue8m0)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    amax = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / torch.finfo(torch.float8_e4m3fn).max)))
    quantised = (padded / _expand(scale)).to(torch.float8_e4m3fn)
    return quantised[:rows, :columns].contiguous(), scale


def dequantise_blocks(quantised: Tensor, scale: Tensor) -> Tensor:
    """The inverse of quantise_blocks, in fp32."""
    rows, columns = quantised.shape
    return quantised.float() * _expand(scale)[:rows, :columns]


def _expand(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)


class _Draw:
    """Named normal tensors: the same seed and name always give the same values."""

    def __init__(self, seed: int, prefix: str) -> None:
        self.seed, self.prefix = seed, prefix

    def __call__(self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> Named:
        digest = hashlib.sha256(f"{self.seed}/{self.prefix}{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return name, torch.randn(shape, generator=generator) * std + mean

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0) -> Named:
        """Keeps the variance of its input, times gain squared."""
        return self(name + ".weight", rows, columns, std=gain * columns**-0.5)

    def norm(self, name: str, size: int) -> Named:
        return self(name + ".weight", size, std=0.1, mean=1.0)


def _values(model: SmallModel) -> Iterator[Named]:
    config, gain = model.config, DEFAULT_GAINS | model.gains
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    draw = _Draw(model.seed, "")
    embedding = draw("model.embed_tokens.weight", vocab, hidden)
    head_name, head = draw.linear("lm_head", vocab, hidden, gain["lm_head"])
    # The last token weighs most in its successor. One that followed itself would do so for ever.
    head -= gain["self_avoidance"] / hidden * embedding[1]
    # A zero logit never wins against the largest of two thousand, so no answer ends early.
    head[:NUM_SPECIAL_TOKENS] = 0
    final_norm = draw.norm("model.norm", hidden)
    yield from (embedding, (head_name, head), final_norm)

    indexer_types = config.get("indexer_types") or ["full"] * layers
    for layer in range(layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        is_mtp = layer >= layers
        has_indexer = "index_topk" in config and (is_mtp or indexer_types[layer] == "full")
        draw = _Draw(model.seed, prefix)
        # The draft layer repeats the first layer's attention, so that some drafts are accepted.
        attention_draw = _Draw(model.seed, "model.layers.0.") if is_mtp else draw
        for name, value in (
            *_attention(config, gain, attention_draw, has_indexer),
            *_mlp(config, gain, draw, dense=layer < config["first_k_dense_replace"]),
            attention_draw.norm("input_layernorm", hidden),
            draw.norm("post_attention_layernorm", hidden),
        ):
            yield prefix + name, value
        if is_mtp:
            _, noise = draw.linear("eh_proj", hidden, 2 * hidden, gain["mtp_hidden"])
            noise[:, :hidden] += gain["mtp_embedding"] * torch.eye(hidden)
            for name, value in (
                draw.norm("enorm", hidden),
                draw.norm("hnorm", hidden),
                ("eh_proj.weight", noise),
                ("embed_tokens.weight", embedding[1]),
                ("shared_head.norm.weight", final_norm[1]),
                ("shared_head.head.weight", head),
            ):
                yield prefix + name, value


def _attention(config: Config, gain: Gains, draw: _Draw, has_indexer: bool) -> Iterator[Named]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_lora, kv_lora = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value_dim = config["v_head_dim"]

    kv_a_name, kv_a = draw.linear("self_attn.kv_a_proj_with_mqa", kv_lora + rope, hidden)
    kv_a[:kv_lora] *= gain["latent"]
    yield kv_a_name, kv_a
    yield draw.linear("self_attn.q_a_proj", q_lora, hidden, gain["latent"])
    yield draw.norm("self_attn.q_a_layernorm", q_lora)
    yield draw.norm("self_attn.kv_a_layernorm", kv_lora)
    yield draw.linear("self_attn.q_b_proj", heads * (nope + rope), q_lora, gain["attention_logits"])
    yield draw.linear("self_attn.kv_b_proj", heads * (nope + value_dim), kv_lora)
    yield draw.linear("self_attn.o_proj", hidden, heads * value_dim, gain["attention"])
    if has_indexer:
        index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
        yield draw.linear("self_attn.indexer.wq_b", index_heads * index_dim, q_lora)
        yield draw.linear("self_attn.indexer.wk", index_dim, hidden)
        yield draw.norm("self_attn.indexer.k_norm", index_dim)
        yield draw("self_attn.indexer.k_norm.bias", index_dim, std=0.1)
        yield draw.linear("self_attn.indexer.weights_proj", index_heads, hidden)


def _mlp(config: Config, gain: Gains, draw: _Draw, dense: bool) -> Iterator[Named]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]

    def block(prefix: str, size: int, scale: float) -> Iterator[Named]:
        yield draw.linear(prefix + ".gate_proj", size, hidden)
        yield draw.linear(prefix + ".up_proj", size, hidden)
        yield draw.linear(prefix + ".down_proj", hidden, size, scale)

    if dense:
        yield from block("mlp", config["intermediate_size"], gain["mlp"])
        return
    experts = config["n_routed_experts"]
    yield draw.linear("mlp.gate", experts, hidden)
    yield draw("mlp.gate.e_score_correction_bias", experts, std=0.05)
    for expert in range(experts):
        yield from block(f"mlp.experts.{expert}", inner, gain["experts"])
    yield from block("mlp.shared_experts", inner * config["n_shared_experts"], gain["mlp"])
