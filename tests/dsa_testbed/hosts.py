"""The hosts that the serving tests run on, and what a test may want of one, in its own flags.

Every host is asked the same prompts and compared with the same reference, so hosts that pass also
agree with each other, token for token.
"""

from dataclasses import dataclass

from dsa_testbed.server import Server, VllmServer
from dsa_testbed.sglang_server import SglangServer


@dataclass(frozen=True)
class Setting:
    """Flags and environment variables."""

    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Host:
    """A server class and its settings by name; a host lacks the settings that it has no flags for.

    bf16: the checkpoint's dtype and everything else at its default.
    exact: fp32, requests up to 4,352 tokens, 16 at once, prompts in chunks of 256.
    tight: so few cache pages that the requests of the pressure set, all at once, cannot all stay.
    mtp: two drafts of the MTP layer a step.
    two_ranks: two tensor-parallel ranks. two_ranks_dp: attention data-parallel, the rest
    tensor-parallel. two_stages: two pipeline stages.
    fp8_caches: both caches in fp8.
    """

    server: type[Server]
    of: dict[str, Setting]

    def settings(self, *names: str) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of several settings together; "" is none."""
        chosen = [self.of[name] for name in names if name]
        args = [arg for setting in chosen for arg in setting.args]
        return args, dict(pair for setting in chosen for pair in setting.env)


# One 4,352-token request takes 68 pages of 64. The pressure set starts in 88 and wants 132: at most
# 30 of its 44 requests can have theirs at once.
_TIGHT_PAGES = 90
_FP8_INDEX_CACHE = (("DSA_INDEX_CACHE_DTYPE", "fp8"),)

VLLM = Host(
    VllmServer,
    {
        "exact": Setting(
            (
                *("--dtype", "float32"),
                *("--max-model-len", "4352"),
                *("--max-num-batched-tokens", "256"),
                *("--max-num-seqs", "16"),
                *("--enable-chunked-prefill", "--enable-prefix-caching"),
            ),
            (("VLLM_CPU_KVCACHE_SPACE", "1"),),
        ),
        "bf16": Setting(("--max-model-len", "4352"), (("VLLM_CPU_KVCACHE_SPACE", "1"),)),
        "tight": Setting(
            (
                *("--num-gpu-blocks-override", str(_TIGHT_PAGES)),
                *("--max-num-seqs", "44"),
                "--enable-log-requests",
            ),
            # For generate_at_once.
            (("VLLM_SERVER_DEV_MODE", "1"),),
        ),
        "mtp": Setting(("--spec-method", "mtp", "--spec-tokens", "2")),
        "two_ranks": Setting(
            ("--tensor-parallel-size", "2"), (("VLLM_CPU_OMP_THREADS_BIND", "0|1"),)
        ),
        "fp8_caches": Setting(("--kv-cache-dtype", "fp8_ds_mla"), _FP8_INDEX_CACHE),
    },
)
_TWO_CORES = (("SGLANG_CPU_OMP_THREADS_BIND", "0|1"),)
SGLANG = Host(
    SglangServer,
    {
        "exact": Setting(
            (
                *("--dtype", "float32"),
                *("--context-length", "4352"),
                *("--chunked-prefill-size", "256"),
                *("--max-running-requests", "16"),
                *("--max-total-tokens", "32768"),
                *("--max-prefill-tokens", "8192"),
                *("--page-size", "64"),
                # SGLang's default is 0 with data parallelism: it sets aside a GPU's activations.
                # And what other processes take while it loads counts as its own.
                *("--mem-fraction-static", "0.5"),
            ),
            # Small steps that wait for a second thread take thrice as long where cores are shared.
            (("OMP_NUM_THREADS", "1"),),
        ),
        "bf16": Setting(("--context-length", "4352")),
        "tight": Setting(
            (
                *("--max-total-tokens", str(64 * _TIGHT_PAGES)),
                *("--max-running-requests", "44"),
                # Admit requests as if none would grow.
                *("--schedule-conservativeness", "0"),
            )
        ),
        "mtp": Setting(
            (
                *("--speculative-algorithm", "NEXTN"),
                *("--speculative-num-steps", "2"),
                *("--speculative-eagle-topk", "1"),
                *("--speculative-num-draft-tokens", "3"),
            ),
            # What SGLang does with drafts is in Triton alone; interpreting our ops too takes hours.
            (("TRITON_INTERPRET", "1"), ("DSA_KERNELS", "torch")),
        ),
        "two_ranks": Setting(("--tp-size", "2"), _TWO_CORES),
        "two_stages": Setting(("--pp-size", "2"), _TWO_CORES),
        "two_ranks_dp": Setting(
            ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"), _TWO_CORES
        ),
        "fp8_caches": Setting(("--kv-cache-dtype", "fp8_e4m3"), _FP8_INDEX_CACHE),
    },
)
HOSTS = {host.server.host: host for host in (VLLM, SGLANG)}
