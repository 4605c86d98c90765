"""Tokens that a plan says fit, beside the host's own log line."""

import re

import pytest

from dsa_plugin.planning.deployment import GIB, tokens_that_fit
from dsa_plugin.planning.model import ModelShape
from dsa_plugin.planning.sizes import CacheDtype, cache_bytes_per_token
from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.hosts import HOSTS

pytestmark = [pytest.mark.serving, pytest.mark.matrix]

# Nothing is asked of the servers, so nothing need be compiled or warmed up. 0.2 is of SGLang's free
# memory; its default would leave other processes none.
_ARGS = {
    "vllm": ["--enforce-eager"],
    "sglang": ["--mem-fraction-static", "0.2", "--skip-server-warmup"],
}


def space_and_tokens(host: str, log: str, env: dict[str, str]) -> tuple[float, int]:
    """Bytes for the caches and tokens in them, as the host has it."""
    if host == "vllm":
        tokens = re.search(r"KV cache size: ([\d,]+) tokens", log)
        space = env["VLLM_CPU_KVCACHE_SPACE"]
    else:
        tokens = re.search(r"KV Cache is allocated\..* #tokens: (\d+), KV size: ([\d.]+) GB", log)
        space = tokens[2] if tokens else ""
    assert tokens is not None, log
    return float(space) * GIB, int(tokens[1].replace(",", ""))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("checkpoint", "kv_dtype", "index_dtype"),
    [("bench_dsa", "fp8", "fp8"), ("glm52-bf16", "bf16", "bf16"), ("v32-bf16", "bf16", "fp8")],
)
def test_tokens_that_fit_are_the_hosts(
    host: str, checkpoint: str, kv_dtype: CacheDtype, index_dtype: CacheDtype
) -> None:
    path = make_checkpoint(checkpoint)
    args, env = HOSTS[host].settings("bf16", "fp8_caches" if kv_dtype == "fp8" else "")
    env["DSA_INDEX_CACHE_DTYPE"] = "fp8" if index_dtype == "fp8" else "model"
    with HOSTS[host].server(path, [*args, *_ARGS[host]], env, start_timeout=1200) as server:
        space, tokens = space_and_tokens(host, server.log_text(), env)
    model = ModelShape.from_config(checkpoint, load_config(path))
    per_token = sum(cache_bytes_per_token(model, kv_dtype, index_dtype, mtp=False))
    planned = tokens_that_fit(space, per_token)
    print(f"{host}, {checkpoint}: {tokens} tokens, planned {planned} ({planned / tokens - 1:+.2%})")
    assert planned == pytest.approx(tokens, rel=0.02)
