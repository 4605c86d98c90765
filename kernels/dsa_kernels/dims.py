"""Sizes of the two caches: numbers alone, so that plans take them without torch.

What lies where in an entry: `layout.py`.
"""

KV_LORA_RANK = 512
ROPE_DIM = 64
LATENT_DIM = KV_LORA_RANK + ROPE_DIM
INDEX_HEAD_DIM = 128
INDEX_PAGE = 64  # tokens a page that DeepGEMM's paged kernels read; ours take any block size

FP8_BLOCK = 128  # values that share one scale, in both caches
FP8_MAX = 448.0  # largest finite e4m3fn
LATENT_SCALES = KV_LORA_RANK // FP8_BLOCK
LATENT_FP8_BYTES = KV_LORA_RANK + 4 * LATENT_SCALES + 2 * ROPE_DIM  # 656
INDEX_FP8_BYTES = INDEX_HEAD_DIM + 4  # 132

# What a config.json has to say for its caches to have these layouts; every released model does.
CONFIG_SIZES = {
    "kv_lora_rank": KV_LORA_RANK,
    "qk_rope_head_dim": ROPE_DIM,
    "index_head_dim": INDEX_HEAD_DIM,
}


def latent_bytes_per_token(itemsize: int) -> int:
    """Bytes that one token takes in one layer's latent cache; itemsize 1 is fp8 with its scales."""
    return LATENT_FP8_BYTES if itemsize == 1 else LATENT_DIM * itemsize


def index_bytes_per_token(itemsize: int) -> int:
    """Bytes that one token takes in one layer's index cache; itemsize 1 is fp8 with its scale."""
    return INDEX_FP8_BYTES if itemsize == 1 else INDEX_HEAD_DIM * itemsize
