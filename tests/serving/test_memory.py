"""Tokens that fit in the same space, by the host's own log line: DSA in fp8, dense in bf16."""

import re

import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.matrix]

# A layer's bytes a token: 656 of latent and 132 of index key; 576 bf16 values.
DSA, DENSE = 656 + 132, 2 * 576


def tokens_that_fit(model: str, *args: str) -> int:
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "DSA_INDEX_CACHE_DTYPE": "fp8"}
    with VllmServer(make_checkpoint(model), ["--max-model-len", "4096", *args], env) as server:
        line = re.search(r"KV cache size: ([\d,]+) tokens", server.log_text())
    assert line is not None
    return int(line[1].replace(",", ""))


def test_fp8_holds_more_tokens_than_dense_bf16() -> None:
    dsa = tokens_that_fit("bench_dsa", "--kv-cache-dtype", "fp8_ds_mla")
    dense = tokens_that_fit("bench_dense")
    print(f"tokens in 1 GiB of a 4-layer model: DSA fp8 {dsa}, dense bf16 {dense}")
    assert dsa / dense == pytest.approx(DENSE / DSA, rel=0.005)
    assert dsa / dense > 1.45
