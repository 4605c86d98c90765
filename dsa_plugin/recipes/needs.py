"""A recipe's sizes: its flags as a deployment of `dsa_plugin.planning`."""

from __future__ import annotations

from dsa_plugin.planning.deployment import VLLM_MEMORY, Deployment
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.planning.model import find_registered
from dsa_plugin.recipes.schema import Needs, Recipe

CONTEXT_FLAG = {"vllm": "max-model-len", "sglang": "context-length"}
_MEMORY_FLAG = {"vllm": "gpu-memory-utilization", "sglang": "mem-fraction-static"}
_PREFILL_CHUNK = 8192


def compute_needs(recipe: Recipe) -> Needs | None:
    """What the recipe needs; None without a GPU to size for.

    Raises:
        ValueError: not one request of its longest context fits, or a model or GPU is not known.
    """
    if recipe.hardware.gpu == "cpu":
        return None
    planned = deployment(recipe)
    requests = planned.requests_per_rank(planned.context)
    if not requests:
        raise ValueError(
            f"{planned.tokens_per_rank():,} tokens fit, less than one request of "
            f"{planned.context:,}: lower --{CONTEXT_FLAG[recipe.host_name]}"
        )
    return Needs(
        weights_gb_per_gpu=round(planned.weight_bytes / 1e9, 1),
        kv_gb_per_gpu=round(planned.cache_space / 1e9, 1),
        max_context=planned.context,
        concurrency=requests * planned.dp,
    )


def deployment(recipe: Recipe) -> Deployment:
    """The recipe as `dsa plan` sees it.

    Raises:
        ValueError: a model or GPU is not known.
    """
    host = recipe.host_name
    release = recipe.quantised_from or recipe.model
    model = find_registered(release)
    if model is None or recipe.weights == "fp32":
        raise ValueError(f"{release} with {recipe.weights} weights cannot be sized")

    def number(flag: str, default: float) -> float:
        value = recipe.args.get(flag, default)
        if not isinstance(value, int | float):
            raise ValueError(f"--{flag} is {value!r}, which is no number")
        return value

    tp = number("tensor-parallel-size", 1)
    if host == "vllm":
        dp = number("data-parallel-size", 1)
        ep = float(recipe.gpus if recipe.args.get("enable-expert-parallel") else 1)
    else:
        dp = number("attention-data-parallel-size", 1)  # of the tensor-parallel ranks
        tp, ep = tp / dp, number("expert-parallel-size", 1)
    return Deployment(
        model=model,
        gpu=find_gpu(recipe.hardware.gpu),
        count=recipe.gpus,
        tp=int(tp),
        dp=int(dp),
        ep=int(ep),
        context=int(number(CONTEXT_FLAG[host], model.max_position_embeddings)),
        kv_dtype="fp8" if str(recipe.args.get("kv-cache-dtype", "")).startswith("fp8") else "bf16",
        index_dtype="fp8",
        weights_dtype=recipe.weights,
        mtp=False,
        memory_utilization=number(_MEMORY_FLAG[host], VLLM_MEMORY),  # SGLang's recipes name it
        prefill_chunk=_PREFILL_CHUNK,
    )
