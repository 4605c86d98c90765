"""Dollars a million tokens from times, beside the costs that DeepSeek published.

Published: DeepSeek-V3.2-Exp report, figure 3 (cost.jpg of its repository): inference cost on H800s
at 2 dollars a GPU-hour by the token's position, read off the figure; DSA is V3.2-Exp, dense is
V3.1-Terminus. For its machines and their load: DeepSeek-V3/R1 inference system overview
(deepseek-ai/open-infra-index, day 6).
"""

from __future__ import annotations

from dataclasses import dataclass

from dsa_plugin.planning.deployment import VLLM_MEMORY, Deployment
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.model import registered_models
from dsa_plugin.planning.roofline import Rates, step_time
from dsa_plugin.planning.sizes import Attention
from dsa_plugin.planning.work import Batch, Stage

# vLLM's default of max_num_seqs, but for its largest GPUs: more requests at once would wait.
MOST_REQUESTS = 256
PUBLISHED_PRICE = 2.0
_K = 1024
# 14,800 tokens a second on 8 GPUs, 20 to 22 a second for each request: about 88 requests a GPU.
_DEEPSEEK_REQUESTS = 88
# Each step verifies one MTP draft and yields 1.8 tokens: DeepSeek-V3 report, section 5.4.3.
_MTP_QUERIES, _MTP_TOKENS = 2, 1.8


@dataclass(frozen=True)
class Published:
    """One point of DeepSeek's figure."""

    stage: Stage
    attention: Attention
    position: int
    dollars: float


BASIS = (
    "Decode at a context: a plan has every request there, as many as fit; DeepSeek's figure has "
    f"one token's attention there, and its share of a step of {_DEEPSEEK_REQUESTS} requests a GPU, "
    "more than fit at 128K"
)

PUBLISHED = (
    Published("prefill", "dense", 1, 0.055),
    Published("prefill", "dense", 128 * _K, 0.665),
    Published("prefill", "dsa", 1, 0.06),
    Published("prefill", "dsa", 13 * _K // 2, 0.10),
    Published("prefill", "dsa", 128 * _K, 0.185),
    Published("decode", "dense", 1, 0.08),
    Published("decode", "dense", 128 * _K, 2.15),
    Published("decode", "dsa", 1, 0.10),
    Published("decode", "dsa", 2 * _K, 0.15),
    Published("decode", "dsa", 128 * _K, 0.25),
)


def prefill_dollars(
    d: Deployment, rates: Rates, position: int, kind: Attention, price: float
) -> float:
    """Dollars a million prompt tokens, of a chunk that ends at `position` or of prompts so long."""
    queries = min(d.prefill_chunk, position)
    batch = Batch("prefill", d.prefill_chunk // queries, queries, position)
    return _dollars(d, rates, batch, kind, price, batch.rows)


def decode_dollars(
    d: Deployment, rates: Rates, context: int, kind: Attention, price: float
) -> float | None:
    """Dollars a million tokens, all requests of that context, as many as fit; None: none fits."""
    requests = min(MOST_REQUESTS, d.requests_per_rank(context, kind))
    batch = Batch("decode", requests, 1, context)
    return _dollars(d, rates, batch, kind, price, requests) if requests else None


def published_estimate(stage: Stage, kind: Attention, position: int) -> float:
    """The same estimate for DeepSeek's machines, load and price.

    Its figure cannot mean that all requests have that position: 88 of 128K tokens do not fit. So
    one token's own attention is at the position and the rest of the step is shared by 88 requests.
    """
    if stage == "prefill":
        d = _deepseek(32)
        return prefill_dollars(d, Rates(d.gpu), position, kind, PUBLISHED_PRICE)
    d = _deepseek(144)
    batch = Batch("decode", _DEEPSEEK_REQUESTS, _MTP_QUERIES, max(_MTP_QUERIES, position))
    tokens = _DEEPSEEK_REQUESTS * _MTP_TOKENS
    return _dollars(d, Rates(d.gpu), batch, kind, PUBLISHED_PRICE, tokens)


def _dollars(
    d: Deployment, rates: Rates, batch: Batch, kind: Attention, price: float, tokens: float
) -> float:
    """`tokens`: what one step of one attention rank yields."""
    seconds = step_time(d, rates, batch, kind).total
    return d.count * price / 3600 * seconds / (tokens * d.dp) * 1e6


def _deepseek(gpus: int) -> Deployment:
    """V3.2 with attention data-parallel and experts over all GPUs: 32 to prefill, 144 to decode."""
    return Deployment(
        model=registered_models()["deepseek-ai/DeepSeek-V3.2-Exp"],
        gpu=find_gpu("h800"),
        count=gpus,
        tp=1,
        dp=gpus,
        ep=gpus,
        context=128 * _K,
        kv_dtype="fp8",
        index_dtype="fp8",
        weights_dtype="fp8",
        mtp=True,
        memory_utilization=VLLM_MEMORY,
        prefill_chunk=8192,
    )
