"""DSA against dense MLA on a CPU, through a host's server, in one run.

    make vllm sglang
    PYTHONPATH=tests .venv/vllm/bin/python benchmarks/serve_cpu.py --host vllm    # or sglang

Two random models of the same 4 layers and real attention dims (16 heads, 512 + 64 latent, 128/128
nope and v): one as DeepSeek-V3.2 with a 64 x 128 indexer and index_topk 2048 through the plugin,
one as dense DeepSeek-V3 on the host's own attention for CPUs. For each context length: time to
first token and time per output token of a single request over the OpenAI API; KV bytes per token
from the host's own cache-size log line. Writes serve_cpu_<host>.json and .png beside this file,
anew after each model.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.server import Server, VllmServer
from dsa_testbed.sglang_server import SglangServer, sglang_python

HERE = Path(__file__).parent
KV_CACHE_GIB = 2
TIMEOUT_S = 1200  # without a token
FP8_INDEX_CACHE = {"DSA_INDEX_CACHE_DTYPE": "fp8"}
MODEL_INDEX_CACHE = {"DSA_INDEX_CACHE_DTYPE": "model"}


@dataclass(frozen=True)
class Variant:
    """A checkpoint, the host's arguments and environment variables."""

    model: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """A server and what its log says.

    Attributes:
        python: interpreter of its environment.
        args: of every variant, before the longest context.
        cores: how many compute.
        kv_bytes_per_token: by its log.
        death: a pattern of the line on a worker that died.
    """

    server: type[Server]
    python: Callable[[], Path]
    args: tuple[str, ...]
    env: Mapping[str, str]
    variants: Mapping[str, Variant]
    cores: Callable[[Server], int]
    kv_bytes_per_token: Callable[[Server], float]
    death: str


def logged(server: Server, pattern: str) -> str:
    """The group of a pattern in the server's log."""
    match = re.search(pattern, server.log_text())
    if match is None:
        raise RuntimeError(f"{server.log} has no line like {pattern!r}")
    return match[1]


def _vllm_kv_bytes(server: Server) -> float:
    tokens = logged(server, r"KV cache size: ([\d,]+) tokens")
    return (KV_CACHE_GIB << 30) / int(tokens.replace(",", ""))


def _sglang_kv_bytes(server: Server) -> float:
    gib = float(logged(server, r"KV Cache is allocated.* KV size: ([\d.]+) GB"))
    return gib * (1 << 30) / int(logged(server, r"KV Cache is allocated.* #tokens: (\d+)"))


HOSTS = {
    "vllm": Host(
        VllmServer,
        lambda: Path(sys.executable),
        ("--no-enable-prefix-caching", "--max-model-len"),
        {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            # 300 by default; a pass may take longer.
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(TIMEOUT_S),
        },
        {
            "dsa bf16": Variant("bench_dsa", env=MODEL_INDEX_CACHE),
            "dsa fp8": Variant("bench_dsa", ("--kv-cache-dtype", "fp8_ds_mla"), FP8_INDEX_CACHE),
            "dense bf16": Variant("bench_dense"),
            # Without AMX vLLM's MLA prefills in one pass, whose scores outgrow a small machine's
            # memory.
            "dense bf16, MHA": Variant("bench_dense", env={"VLLM_MLA_DISABLE": "1"}),
        },
        cores=lambda server: len(logged(server, r"core ids=\[([\d, ]+)\]").split(",")),
        kv_bytes_per_token=_vllm_kv_bytes,
        death=r"(Worker proc \S+ died unexpectedly \(exit code: -?\d+\))",
    ),
    "sglang": Host(
        SglangServer,
        sglang_python,
        (
            # About as much space; left alone, SGLang counts what other processes take as its own.
            *("--mem-fraction-static", "0.5"),
            *("--max-total-tokens", "400000"),
            *("--disable-radix-cache", "--context-length"),
        ),
        # As vLLM does it: one core is the API server's.
        {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1))},
        {
            "dsa bf16": Variant("bench_dsa", env=MODEL_INDEX_CACHE),
            "dsa fp8": Variant("bench_dsa", ("--kv-cache-dtype", "fp8_e4m3"), FP8_INDEX_CACHE),
            "dense bf16": Variant("bench_dense", ("--attention-backend", "torch_native")),
        },
        cores=lambda _server: max(1, len(os.sched_getaffinity(0)) - 1),
        kv_bytes_per_token=_sglang_kv_bytes,
        death=r"(Subprocess \S+ \(pid=\d+\) crashed with exit code -?\d+)",
    ),
}


def measure(server: Server, context: int, output_tokens: int, vocab: int) -> dict[str, float]:
    """TTFT and TPOT, in seconds, of one streamed request of `context` random tokens."""
    client = openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0
    )
    rng = random.Random(context)
    prompt = [rng.randrange(8, vocab) for _ in range(context)]
    start = time.perf_counter()
    stream = client.completions.create(
        model=str(server.model),
        prompt=prompt,
        max_tokens=output_tokens,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    arrivals = [time.perf_counter() for _ in stream]
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    return {"ttft_s": arrivals[0] - start, "tpot_s": statistics.median(gaps)}


def run(host: Host, variant: Variant, contexts: list[int], output_tokens: int) -> dict[str, Any]:
    """Figures of one server; a context that it fails at ends them, with the reason."""
    checkpoint = make_checkpoint(variant.model)
    vocab = load_config(checkpoint)["vocab_size"]
    args = [*host.args, str(max(contexts) + output_tokens + 8), *variant.args]
    rows: dict[str, Any] = {}
    with host.server(checkpoint, args, {**host.env, **variant.env}) as server:
        result = {
            "cores": host.cores(server),
            "kv_bytes_per_token": host.kv_bytes_per_token(server),
            "contexts": rows,
        }
        measure(server, 512, 4, vocab)
        for context in contexts:
            try:
                rows[str(context)] = measure(server, context, output_tokens, vocab)
            except openai.APITimeoutError:
                rows[str(context)] = {"failed": f"no token within {TIMEOUT_S} s"}
            except openai.APIError:
                rows[str(context)] = {"failed": logged(server, host.death)}
            print(f"{context:>6} tokens: {rows[str(context)]}", flush=True)
            if "failed" in rows[str(context)]:
                break
    return result


def versions(host: Host) -> dict[str, str]:
    """Of the host and of torch, in the host's environment."""
    names = (host.server.host, "torch")
    code = f"import importlib.metadata as m; print(*map(m.version, {names}))"
    output = subprocess.check_output([str(host.python()), "-c", code], text=True)
    return dict(zip(names, output.split(), strict=True))


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, result in report["results"].items():
        rows = {int(c): row for c, row in result["contexts"].items() if "failed" not in row}
        for axis, key, scale in ((axes[0], "ttft_s", 1), (axes[1], "tpot_s", 1e3)):
            axis.plot([*rows], [scale * row[key] for row in rows.values()], marker="o", label=name)
    axes[0].set_ylabel("time to first token, s")
    axes[1].set_ylabel("time per output token, ms")
    for axis in axes:
        axis.set_xlabel("context, tokens")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    cores = max(result["cores"] for result in report["results"].values())
    machine = f"{cores} core of {report['cpu']}"
    figure.suptitle(f"4 layers, 16 heads; {machine}; {report['host']} {report[report['host']]}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return names[1] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", choices=HOSTS, default="vllm")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--variants", nargs="+", help="some of the host's; default: all")
    parser.add_argument("--output", type=Path, help="default: serve_cpu_<host>.json")
    args = parser.parse_args()
    host = HOSTS[args.host]
    variants = args.variants or list(host.variants)
    if unknown := set(variants) - set(host.variants):
        parser.error(f"--variants {sorted(unknown)}: {args.host} has {list(host.variants)}")
    output = args.output or HERE / f"serve_cpu_{args.host}.json"
    report: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "host": args.host,
        **versions(host),
        "output_tokens": args.output_tokens,
        "results": {},
    }
    for name in variants:
        print(name, flush=True)
        report["results"][name] = run(host, host.variants[name], args.contexts, args.output_tokens)
        output.write_text(json.dumps(report, indent=2) + "\n")
        plot(report, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
