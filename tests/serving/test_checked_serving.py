"""DSA_CHECK=1 in live servers: no alarm while tokens stay right, and each planted fault named."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.exactness import MAX_TOKENS, mismatches
from dsa_testbed.hosts import HOSTS
from dsa_testbed.prompts import ci_set, pressure_set, text_tokens
from dsa_testbed.server import Server, ServerError

pytestmark = pytest.mark.serving

CHECKED = {"DSA_CHECK": "1"}
ON = "DSA_CHECK=1: every pass of every layer is checked"
# Host, family and features of hosts.Host: chunks of 256, prefix cache and 16 at once in all.
SOUND = [
    ("vllm", "v32", ("tight",)),
    ("vllm", "glm52", ("tight",)),
    ("vllm", "glm52", ("mtp",)),
    ("vllm", "v32", ("mtp", "fp8_caches")),
    ("vllm", "v32", ("two_ranks",)),
    ("sglang", "v32", ("tight",)),
    ("sglang", "glm52", ("mtp",)),
    ("sglang", "v32", ("mtp", "fp8_caches")),
    ("sglang", "glm52", ("two_ranks_dp",)),
    ("sglang", "glm52", ("two_stages",)),
]
FAULTS = {
    "index_key_not_written_short_prompt": r"its index key was not written to slot \d+",
    "stale_index_page": r"its index key was not written to slot \d+",
    "topk_minus_one": r"its selection has 63 tokens, and has to have 64",
    "selected_twice": r"position \d+ of its selection does not come after the one before it",
    "slots_elsewhere": r"position \d+, which it selected, was looked for in slot \d+",
    "nan_latent": r"its latent was written to slot \d+ as NaN",
    "pages_swapped": r"lies in a slot that was last written for position \d+",
}
IN_CI = {("vllm", "pages_swapped"), ("sglang", "stale_index_page")}
LAYER = {
    "vllm": r"layer model\.layers\.0\.self_attn, request \(row \d+ of the batch's requests\)",
    "sglang": r"layer 0, request [0-9a-f]{32} \(row \d+ of the batch's requests\)",
}


def started(host: str, family: str, *features: str, **options: Any) -> Server:
    args, env = HOSTS[host].settings("exact", *features)
    return HOSTS[host].server(make_checkpoint(family), args, env | CHECKED, **options)


def ask(host: str, fault: str, log: Path) -> None:
    """Prompts of which some are selected from, some in their decodes alone, and some never.

    SGLang's own first request, at its start, may be the one that finds it.
    """
    with started(host, "v32", mutation=fault, log=log) as server:
        for tokens in (30, 63, 200):
            server.complete(text_tokens(0, tokens), 4, ignore_eos=True)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("host", "family", "features"), SOUND, ids=lambda value: " ".join(value) if value else ""
)
def test_no_alarm(host: str, family: str, features: tuple[str, ...]) -> None:
    """A violation would end the server. In fp8 tokens are others than transformers'."""
    checkpoint, prompts = make_checkpoint(family), ci_set()
    with started(host, family, *features) as server:
        assert ON in server.log_text()
        for batch in (prompts, prompts[::-1]):
            wrong = mismatches(server, checkpoint, batch, MAX_TOKENS)
            assert not wrong or "fp8_caches" in features, "\n".join(wrong)
        if "tight" in features:
            crowd = pressure_set()
            assert mismatches(server, checkpoint, crowd, MAX_TOKENS, len(crowd)) == []
            assert server.counters().preemptions >= 4
        assert server.counters().cached_tokens > 0


@pytest.mark.parametrize(
    ("host", "fault"),
    [
        pytest.param(
            host,
            fault,
            id=f"{host} {fault}",
            marks=[] if (host, fault) in IN_CI else [pytest.mark.matrix],
        )
        for host in HOSTS
        for fault in FAULTS
    ],
)
def test_a_planted_fault_is_found(host: str, fault: str, tmp_path: Path) -> None:
    """On a CPU in the pass that has it, before an answer to the request is complete."""
    file = tmp_path / "server.log"
    with pytest.raises((httpx.HTTPError, ServerError)):
        ask(host, fault, file)
    log = file.read_text(encoding="utf-8", errors="replace")
    assert ON in log
    said = re.search(rf"DSA_CHECK: .*{FAULTS[fault]}.*", log)
    assert said, log[-4000:]
    print(said[0])
    assert re.match(rf"DSA_CHECK: {LAYER[host]}, token row \d+, position \d+: ", said[0])
