"""Exact tokens, and the plugin beside a GPU's native DSA, through `vllm serve`.

    PYTHONPATH=tests python benchmarks/serve_gpu.py              # beside vLLM's CUDA build, 0.26 on
    PYTHONPATH=tests python benchmarks/serve_gpu.py --dry-run    # tiny, on a CPU: tests the script

Small checkpoints in fp32 have to answer as transformers does, token for token, with decodes in CUDA
graphs and with vLLM's default compilation. Then a model of a few layers with DeepSeek-V3.2's
attention and dense dimensions, dummy weights and fp8 caches: time to first token and time per
output token of one request at each context, by the plugin and by vLLM's own FlashMLA and DeepGEMM
(DSA_PLUGIN=off), in turn.

Servers start side by side, as many as fit; one that fails is a row that says why. Each figure is
written at once (results.py). None of these models has experts, which are the host's alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import provenance, version
from results import Results, add_options, why
from serve_cpu import measure

from dsa_testbed import tokenizer
from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.exactness import MAX_TOKENS, mismatches
from dsa_testbed.hosts import VLLM
from dsa_testbed.prompts import Prompt, ci_set
from dsa_testbed.server import VllmServer
from dsa_testbed.small_models import Config, small_model

HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "index_n_heads": 64}
EXACT: dict[str, Config] = {
    "v32": {"first_k_dense_replace": 99, **HEADS},
    "glm52": {"first_k_dense_replace": 99},
}
# deepseek-ai/DeepSeek-V3.2's, but for the vocabulary.
DIMENSIONS = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
}
REPEATS = 2  # the first may wait for something to be compiled
START_TIMEOUT_S = 1800
START_SHARE = 0.7  # of the time that is left: one that hangs leaves some to the others


@dataclass(frozen=True)
class Job:
    """A server, and what it is for.

    Attributes:
        name: of its cases, or how theirs begin.
        model, args, env: of `vllm serve`.
        gib, cache_gib: of a GPU's memory: all of it, and of it the caches.
        exact: whether its tokens are compared, or its times taken.
    """

    name: str
    model: Path
    args: list[str]
    env: dict[str, str]
    gib: int
    cache_gib: int
    exact: bool

    def server(self, logs: Path, start_timeout: float) -> VllmServer:
        args = [*self.args]
        if torch.cuda.is_available():  # each is told its own, as others start beside it
            args += ["--gpu-memory-utilization", f"{(self.gib << 30) / gpu_bytes():.3f}"]
            args += ["--kv-cache-memory-bytes", str(self.cache_gib << 30)]
        # FlashInfer's sampler would be compiled at the first request.
        env = {"VLLM_USE_FLASHINFER_SAMPLER": "0", **self.env}
        log = logs / f"{self.name.replace(' ', '-')}.log"
        return VllmServer(self.model, args, env, log=log, start_timeout=start_timeout)


@dataclass(frozen=True)
class Session:
    """Where results and logs go, and what servers are asked.

    Attributes:
        prompts: whose answers are compared.
        contexts, output_tokens: of the requests that are timed.
    """

    results: Results
    logs: Path
    prompts: list[Prompt]
    contexts: list[int]
    output_tokens: int

    def wants(self, job: Job) -> bool:
        cases = [job.name] if job.exact else [f"{job.name} {context}" for context in self.contexts]
        return any(map(self.results.wants, cases))

    def run(self, jobs: list[Job]) -> None:
        """Side by side; times are taken when nothing else runs."""
        with ExitStack() as stack:
            with ThreadPoolExecutor(len(jobs)) as pool:
                servers = list(pool.map(lambda job: self._start(job, stack), jobs))
            for context in self.contexts:
                for job, server in zip(jobs, servers, strict=True):
                    case = f"{job.name} {context}"
                    if server is not None and self.results.wants(case):
                        self._record(case, partial(self._times, server, job, context))

    def _start(self, job: Job, stack: ExitStack) -> VllmServer | None:
        """A server to take times of, if it is ready; tokens are compared here."""
        timeout = min(START_TIMEOUT_S, START_SHARE * self.results.seconds_left)
        server = job.server(self.logs, timeout)
        if job.exact:
            self._record(job.name, partial(self._compare, server, job))
            return None
        if self._record(f"{job.name} start", partial(_enter, server, job, stack)):
            return server
        return None

    def _compare(self, server: VllmServer, job: Job) -> dict[str, Any]:
        """Tokens and those of transformers, 16 requests at once and one by one."""
        with ExitStack() as stack:
            row = _enter(server, job, stack)
            row["prompts"] = len(self.prompts)
            row["differ"] = [
                line
                for concurrency in (16, 1)
                for line in mismatches(server, job.model, self.prompts, MAX_TOKENS, concurrency)
            ]
        return row

    def _times(self, server: VllmServer, job: Job, context: int) -> dict[str, Any]:
        """Of single requests, in seconds."""
        vocab = load_config(job.model)["vocab_size"]
        rows = [measure(server, context, self.output_tokens, vocab) for _ in range(REPEATS)]
        figures = {key: [row[key] for row in rows] for key in rows[0]}
        return {"server": job.name, "context": context, **figures}

    def _record(self, case: str, measure_it: Callable[[], dict[str, Any]]) -> bool:
        """Write what was measured, or why it was not; whether it was."""
        try:
            row = measure_it()
        except Exception as failure:  # noqa: BLE001 (whatever ends a server)
            row = {"failed": why(failure)}
        self.results.add({"case": case, **row})
        print(json.dumps({"case": case, **row}), flush=True)
        return "failed" not in row


def _enter(server: VllmServer, job: Job, stack: ExitStack) -> dict[str, Any]:
    """Start it; an error if another than was asked for serves."""
    stack.enter_context(server)
    if ("dsa_plugin serves" in server.log_text()) != (job.env["DSA_PLUGIN"] == "on"):
        raise RuntimeError(f"{job.env} did not choose what serves")
    return {"startup_s": server.startup_seconds}


def decode_graphs(*batches: int) -> list[str]:
    """Decodes of so many requests in CUDA graphs, nothing compiled."""
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches}
    return ["--compilation-config", json.dumps({"mode": 0, **graphs})]


def exact_jobs(forms: dict[str, list[str]], families: Iterable[str]) -> Iterator[Job]:
    args, env = VLLM.settings("exact")
    env |= {"DSA_PLUGIN": "on", "DSA_INDEX_CACHE_DTYPE": "model"}
    for form, more in forms.items():
        for family in families:
            model = make_checkpoint(family, **EXACT[family])
            yield Job(f"exact {family} {form}", model, [*args, *more], env, 6, 1, exact=True)


def timed_jobs(config: Config, args: list[str], directory: Path) -> Iterator[Job]:
    """The plugin, and the host's own."""
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save(directory, config["vocab_size"], config["max_position_embeddings"])
    args = [*args, "--load-format", "dummy", "--no-enable-prefix-caching"]
    args += ["--kv-cache-dtype", "fp8_ds_mla"]
    for name, switch in (("plugin", "on"), ("native", "off")):
        yield Job(name, directory, args, {"DSA_PLUGIN": switch}, 20, 4, exact=False)


def gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def together(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs in their order, as many at a time as a GPU has room for."""
    room = 0.95 * gpu_bytes() if torch.cuda.is_available() else math.inf
    group: list[Job] = []
    for job in jobs:
        if group and sum(each.gib << 30 for each in (*group, job)) > room:
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def main() -> int:
    parser = argparse.ArgumentParser(description="Exact tokens; the plugin beside native DSA.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--logs", type=Path, help="a folder that keeps what servers say")
    add_options(parser)
    options = parser.parse_args()
    prompts, contexts, output_tokens = ci_set(), options.contexts, options.output_tokens
    if options.dry_run:
        prompts, contexts, output_tokens = prompts[:4], [96, 192], 8
        forms, families = {"eager": ["--enforce-eager"]}, ["v32"]
        config, args = small_model("v32").config, ["--dtype", "float32", "--enforce-eager"]
    elif torch.cuda.is_available():
        forms = {"decode graphs": decode_graphs(1, 2, 4, 8, 16), "default": []}
        families = list(EXACT)
        shape = {"num_hidden_layers": options.layers, "first_k_dense_replace": options.layers}
        config = small_model("bench_dsa", **DIMENSIONS, **shape).config
        args = decode_graphs(1)
    else:
        parser.error("no GPU found; --dry-run serves tiny models on a CPU")
    head = provenance(torch.device("cpu" if options.dry_run else "cuda"))
    head["versions"]["vllm"] = version("vllm")
    results = Results("serve_gpu", head | {"layers": config["num_hidden_layers"]}, options)
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        session = Session(results, logs, prompts, contexts, output_tokens)
        args = [*args, "--max-model-len", str(max(contexts) + output_tokens + 8)]
        jobs = [*timed_jobs(config, args, Path(scratch)), *exact_jobs(forms, families)]
        for group in together([job for job in jobs if session.wants(job)]):
            session.run(group)
    return int(any(row.get("differ") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
