"""The plugin beside a GPU's native DSA, through `vllm serve`, in one run.

    PYTHONPATH=tests python benchmarks/serve_gpu.py              # beside vLLM's CUDA build, 0.26 on
    PYTHONPATH=tests python benchmarks/serve_gpu.py --dry-run    # tiny, on a CPU: tests the script

A model of a few layers with DeepSeek-V3.2's attention and dense dimensions and dummy weights, fp8
caches, CUDA graphs on; served by vLLM's own FlashMLA and DeepGEMM (DSA_PLUGIN=off), by the plugin
(on), and, for its tokens alone, by the plugin's eager torch (DSA_KERNELS=torch). For each context:
time to first token and time per output token of a single request, and the output of a batch of them
together. Writes serve_gpu.json and serve_gpu.png beside this file, or into --out, anew after each
server.

Dummy weights make a token's rivals close, and bf16 sums differ with their order, so the tokens of
two GPU kernels part sooner or later: tests/serving/test_exactness.py is what proves them, in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import torch
from measuring import provenance, version
from serve_cpu import measure

from dsa_testbed import tokenizer
from dsa_testbed.prompts import text_tokens
from dsa_testbed.server import VllmServer
from dsa_testbed.small_models import Config, small_model

# deepseek-ai/DeepSeek-V3.2's, but for the vocabulary, and no experts: neither is compared here.
DIMENSIONS = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
}
PLUGIN = {"DSA_PLUGIN": "on"}
TORCH = {**PLUGIN, "DSA_KERNELS": "torch"}
PROMPT, TOKENS = 300, 32  # of the answers whose tokens are compared


@dataclass(frozen=True)
class Load:
    """What the servers are asked.

    Attributes:
        config: of the model.
        contexts: tokens of a prompt.
        output_tokens: of each answer.
        batch: requests that run together for the throughput.
        args: of `vllm serve`.
    """

    config: Config
    contexts: list[int]
    output_tokens: int
    batch: int
    args: list[str]

    def serve(self, model: Path, env: dict[str, str], *args: str) -> VllmServer:
        length = max(*self.contexts, PROMPT) + self.output_tokens + TOKENS
        common = ["--load-format", "dummy", "--no-enable-prefix-caching"]
        common += ["--kv-cache-dtype", "fp8_ds_mla", "--max-model-len", str(length)]
        # CUDA graphs, torch.compile and DeepGEMM's own compiler take their time.
        return VllmServer(model, [*common, *self.args, *args], env, start_timeout=1800)


def write_model(config: Config, directory: Path) -> None:
    """All that a server with dummy weights reads."""
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save(directory, config["vocab_size"], config["max_position_embeddings"])


def answer(server: VllmServer, env: dict[str, str]) -> list[int]:
    """The tokens to be compared; an error if another than was asked for serves."""
    if ("dsa_plugin serves" in server.log_text()) != (env["DSA_PLUGIN"] == "on"):
        raise RuntimeError(f"{env} did not choose what serves; see {server.log}")
    return server.complete(text_tokens(0, PROMPT), TOKENS, ignore_eos=True).tokens


def figures(server: VllmServer, load: Load) -> dict[str, dict[str, float]]:
    """Of each context, in seconds and tokens a second."""
    vocab, rows = load.config["vocab_size"], {}
    for context in load.contexts:
        row = measure(server, context, load.output_tokens, vocab)
        with ThreadPoolExecutor(load.batch) as pool:
            began = time.perf_counter()
            requests = [
                pool.submit(measure, server, context, load.output_tokens, vocab)
                for _ in range(load.batch)
            ]
            for request in requests:
                request.result()
            elapsed = time.perf_counter() - began
        row["output_tokens_per_s"] = load.batch * load.output_tokens / elapsed
        rows[str(context)] = row
        print(f"{context:>7} tokens: {row}", flush=True)
    return rows


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "ttft_s": "time to first token, s",
        "tpot_s": "time per output token, s",
        "output_tokens_per_s": f"output tokens a second, {report['batch']} requests",
    }
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, result in report["results"].items():
            if rows := result.get("contexts"):
                axis.loglog(
                    [*map(int, rows)], [row[key] for row in rows.values()], "o-", label=name
                )
        axis.set_xscale("log", base=2)
        axis.set(xlabel="context, tokens", title=title)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle(f"{report['layers']} layers; {report['device']}; {report['date']}")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def leading_equal(tokens: list[int], others: list[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return sum(takewhile(bool, map(eq, tokens, others)))


def main() -> int:
    parser = argparse.ArgumentParser(description="The plugin beside a GPU's native DSA.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="requests of the throughput")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU")
    options = parser.parse_args()
    if options.dry_run:
        device = torch.device("cpu")
        load = Load(small_model("v32").config, [96, 192], 8, 2, ["--dtype", "float32"])
        variants = {"plugin": PLUGIN}
    elif torch.cuda.is_available():
        device = torch.device("cuda")
        shape = {"num_hidden_layers": options.layers, "first_k_dense_replace": options.layers}
        config = small_model("bench_dsa", **DIMENSIONS, **shape).config
        load = Load(config, options.contexts, options.output_tokens, options.batch, [])
        variants = {"native": {"DSA_PLUGIN": "off"}, "plugin": PLUGIN}
    else:
        parser.error("no GPU found; --dry-run serves a tiny model on a CPU")

    report = provenance(device)
    report["versions"]["vllm"] = version("vllm")
    report |= {"layers": load.config["num_hidden_layers"], "batch": load.batch, "results": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_model(load.config, model)
        with load.serve(model, TORCH, "--enforce-eager") as server:
            expected = answer(server, TORCH)
        for name, env in variants.items():
            print(name, flush=True)
            with load.serve(model, env) as server:
                equal = leading_equal(answer(server, env), expected)
                print(f"{equal} of {TOKENS} tokens as by eager torch", flush=True)
                rows = figures(server, load)
            report["results"][name] = {"tokens_as_torch": equal, "contexts": rows}
            (options.out / "serve_gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            if version("matplotlib") == "absent":
                print("matplotlib is absent: no serve_gpu.png")
            else:
                plot(report, options.out / "serve_gpu.png")
    # On a CPU both are eager torch; a GPU's kernels round differently.
    all_equal = all(each["tokens_as_torch"] == TOKENS for each in report["results"].values())
    return int(options.dry_run and not all_equal)


if __name__ == "__main__":
    sys.exit(main())
