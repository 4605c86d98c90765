"""The hosts that the serving tests run on, in each one's own flags.

Every host is asked the same prompts and compared with the same reference, so hosts that pass also
agree with each other, token for token.
"""

from dataclasses import dataclass, field
from typing import Any

from dsa_testbed.server import Server, VllmServer
from dsa_testbed.sglang_server import SglangServer


@dataclass(frozen=True)
class Host:
    """A server class, and how a test says what it wants of it."""

    server: type[Server]
    exact: tuple[str, ...]
    """fp32, requests up to 4,352 tokens, 16 at once, prompts in chunks of 256."""
    tight: tuple[str, ...]
    """So few cache pages that 16 requests of the pressure set cannot all stay."""
    mtp: tuple[str, ...]
    """Two drafts of the MTP layer a step."""
    two_ranks: tuple[str, ...]
    two_ranks_env: dict[str, str]
    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Server:
        return self.server(*args, **kwargs)


# One 4,352-token request takes 68 pages of 64. The pressure set starts in 80 and wants 96.
_TIGHT_PAGES = 88

VLLM = Host(
    server=VllmServer,
    exact=(
        *("--dtype", "float32"),
        *("--max-model-len", "4352"),
        *("--max-num-batched-tokens", "256"),
        *("--max-num-seqs", "16"),
    ),
    tight=("--num-gpu-blocks-override", str(_TIGHT_PAGES)),
    mtp=("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}'),
    two_ranks=("-tp", "2"),
    two_ranks_env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    env={"VLLM_CPU_KVCACHE_SPACE": "1"},
)
SGLANG = Host(
    server=SglangServer,
    exact=(
        *("--dtype", "float32"),
        *("--context-length", "4352"),
        *("--chunked-prefill-size", "256"),
        *("--max-running-requests", "16"),
        *("--max-total-tokens", "32768"),
        "--enable-metrics",
    ),
    tight=("--max-total-tokens", str(64 * _TIGHT_PAGES), "--schedule-conservativeness", "0"),
    mtp=(
        *("--speculative-algorithm", "NEXTN"),
        *("--speculative-num-steps", "2"),
        *("--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", "3"),
    ),
    two_ranks=("--tp", "2"),
    two_ranks_env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
)
HOSTS = {host.server.host: host for host in (VLLM, SGLANG)}
