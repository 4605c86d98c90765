"""DSA against dense MLA on a CPU, through `vllm serve`, in one run.

    make vllm && PYTHONPATH=tests .venv/vllm/bin/python benchmarks/serve_cpu.py

Two random models of the same 4 layers and real attention dims (16 heads, 512 + 64 latent, 128/128
nope and v): one as DeepSeek-V3.2 with a 64 x 128 indexer and index_topk 2048 through the plugin,
one as dense DeepSeek-V3 on vLLM's own CPU MLA backend. For each context length: time to first token
and time per output token of a single request over the OpenAI API; KV bytes per token from the
host's own cache-size log line. Writes serve_cpu.json and serve_cpu.png beside this file, anew after
each model.
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch

from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.server import VllmServer

HERE = Path(__file__).parent
KV_CACHE_GIB = 2


@dataclass(frozen=True)
class Variant:
    """A checkpoint, vLLM's arguments and environment variables."""

    model: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


VARIANTS = {
    "dsa bf16": Variant("bench_dsa", env={"DSA_INDEX_CACHE_DTYPE": "model"}),
    "dsa fp8": Variant(
        "bench_dsa", ("--kv-cache-dtype", "fp8_ds_mla"), {"DSA_INDEX_CACHE_DTYPE": "fp8"}
    ),
    "dense bf16": Variant("bench_dense"),
    # Without AMX vLLM's MLA prefills in one pass, whose scores outgrow a small machine's memory.
    "dense bf16, MHA": Variant("bench_dense", env={"VLLM_MLA_DISABLE": "1"}),
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


def logged(server: VllmServer, pattern: str) -> str:
    """The group of a pattern in the server's log."""
    match = re.search(pattern, server.log_text())
    if match is None:
        raise RuntimeError(f"{server.log} has no line like {pattern!r}")
    return match[1]


def run(variant: Variant, contexts: list[int], output_tokens: int) -> dict[str, Any]:
    """Figures of one server; a context that it dies of ends them, with the reason."""
    checkpoint = make_checkpoint(variant.model)
    vocab = load_config(checkpoint)["vocab_size"]
    args = ["--max-model-len", str(max(contexts) + output_tokens + 8), "--no-enable-prefix-caching"]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",  # 300 by default; a pass may take longer
        **variant.env,
    }
    rows: dict[str, Any] = {}
    with VllmServer(checkpoint, [*args, *variant.args], env) as server:
        tokens = int(logged(server, r"KV cache size: ([\d,]+) tokens").replace(",", ""))
        result = {
            "cores": len(logged(server, r"core ids=\[([\d, ]+)\]").split(",")),
            "kv_bytes_per_token": (KV_CACHE_GIB << 30) / tokens,
            "contexts": rows,
        }
        measure(server, 512, 4, vocab)
        for context in contexts:
            try:
                rows[str(context)] = measure(server, context, output_tokens, vocab)
            except openai.APIError:
                death = r"(Worker proc \S+ died unexpectedly \(exit code: -?\d+\))"
                rows[str(context)] = {"failed": logged(server, death)}
            print(f"{context:>6} tokens: {rows[str(context)]}", flush=True)
            if "failed" in rows[str(context)]:
                break
    return result


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
    report: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "vllm": importlib.metadata.version("vllm"),
        "output_tokens": args.output_tokens,
        "results": {},
    }
    for name in args.variants:
        print(name, flush=True)
        report["results"][name] = run(VARIANTS[name], args.contexts, args.output_tokens)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        plot(report, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
