"""DSA against dense MLA on a CPU, through `vllm serve`, in one run.

    make vllm && PYTHONPATH=tests .venv/vllm/bin/python benchmarks/serve_cpu.py

Two random models of the same 4 layers and real attention dims (16 heads, 512 + 64 latent, 128/128
nope and v): one as DeepSeek-V3.2 with a 64 x 128 indexer and index_topk 2048 through the plugin,
one as dense DeepSeek-V3 on vLLM's own CPU MLA backend. For each context length: time to first token
and time per output token of a single request over the OpenAI API; KV bytes per token from the
host's own cache-size log line. Writes serve_cpu.json and serve_cpu.png beside this file.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import itertools
import json
import platform
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any

import openai
import torch

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.server import VllmServer

HERE = Path(__file__).parent
KV_CACHE_GIB = 2
# Model, kv-cache-dtype, index cache dtype.
VARIANTS = {
    "dense bf16": ("bench_dense", "auto", "model"),
    "dsa bf16": ("bench_dsa", "auto", "model"),
    "dsa fp8": ("bench_dsa", "fp8_ds_mla", "fp8"),
}


def measure(server: VllmServer, context: int, output_tokens: int, vocab: int) -> dict[str, float]:
    """TTFT and TPOT, in seconds, of one streamed request of `context` random tokens."""
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=3600)
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


def kv_bytes_per_token(server: VllmServer) -> float:
    """From the host's line on the tokens that fit the given space."""
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", Path(server.log).read_text())
    if tokens is None:
        raise RuntimeError(f"{server.log} has no 'KV cache size' line")
    return (KV_CACHE_GIB << 30) / int(tokens[1].replace(",", ""))


def run(contexts: list[int], output_tokens: int, variants: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in variants:
        model, kv_dtype, index_dtype = VARIANTS[name]
        checkpoint = make_checkpoint(model)
        vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        args = ["--max-model-len", str(max(contexts) + output_tokens + 8)]
        args += ["--kv-cache-dtype", kv_dtype, "--no-enable-prefix-caching"]
        env = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "DSA_INDEX_CACHE_DTYPE": index_dtype,
        }
        with VllmServer(checkpoint, args, env) as server:
            measure(server, 512, 4, vocab)
            rows = {}
            for context in contexts:
                rows[str(context)] = measure(server, context, output_tokens, vocab)
                print(
                    f"{name:>11} {context:>6} tokens: TTFT {rows[str(context)]['ttft_s']:.1f} s, "
                    f"TPOT {1e3 * rows[str(context)]['tpot_s']:.1f} ms",
                    flush=True,
                )
            results[name] = {"kv_bytes_per_token": kv_bytes_per_token(server), "contexts": rows}
    return results


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, result in report["results"].items():
        lengths = [int(c) for c in result["contexts"]]
        for axis, key, scale in ((axes[0], "ttft_s", 1), (axes[1], "tpot_s", 1e3)):
            values = [scale * row[key] for row in result["contexts"].values()]
            axis.plot(lengths, values, marker="o", label=name)
    axes[0].set_ylabel("time to first token, s")
    axes[1].set_ylabel("time per output token, ms")
    for axis in axes:
        axis.set_xlabel("context, tokens")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    machine = f"{report['cpu']}, {report['threads']} cores"
    figure.suptitle(f"4 layers, 16 heads; {machine}; vLLM {report['vllm']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return names[1] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=HERE / "serve_cpu.json")
    args = parser.parse_args()
    report = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": importlib.metadata.version("vllm"),
        "output_tokens": args.output_tokens,
        "results": run(args.contexts, args.output_tokens, args.variants),
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    plot(report, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
