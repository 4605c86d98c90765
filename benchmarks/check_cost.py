"""What DSA_CHECK=1 costs on a CPU: one vLLM engine, its checks on and off in turn.

    PYTHONPATH=tests .venv/vllm/bin/python benchmarks/check_cost.py

The model is serve_cpu.py's, of 4 layers with real attention dimensions. Measured are seconds of
processor time that the process took, which other processes change little: of the prompts, and of
a step after them. Requests of a pair follow each other; the cost is the median of the pairs'
quotients, beside the least and the greatest.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from typing import Any

from dsa_testbed.checkpoint import load_config, make_checkpoint

ENVIRONMENT = {
    "DSA_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def start(context: int) -> tuple[Any, list[Any]]:
    """The engine, and its layers."""
    from vllm import LLM

    from dsa_plugin.hosts.vllm.attention import DSAAttention

    engine = LLM(
        model=str(make_checkpoint("bench_dsa")),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=context + 256,
        max_num_batched_tokens=2048,
        max_num_seqs=8,
    )
    layers: list[Any] = []
    engine.apply_model(
        lambda model: layers.extend(m for m in model.modules() if isinstance(m, DSAAttention))
    )
    return engine, layers


def answer(engine: Any, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds of processor time: until each prompt has its first token, and of a later step."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    prefill, decodes = 0.0, list[float]()
    while engine.has_unfinished_requests():
        began = time.process_time()
        outputs = engine.step()
        spent = time.process_time() - began
        # The step that brings the last first token is the last with a prompt in it.
        if len(outputs) < len(prompts) or (not decodes and prefill_ends(outputs)):
            prefill += spent
        else:
            decodes.append(spent)
    return prefill, statistics.median(decodes)


def prefill_ends(outputs: list[Any]) -> bool:
    """Whether a request has its first token just now."""
    return any(len(output.outputs[0].token_ids) == 1 for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1, help="at once")
    parser.add_argument("--pairs", type=int, default=4)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    engine, layers = start(args.context)
    checks = [layer.check for layer in layers]
    vocab = load_config(make_checkpoint("bench_dsa"))["vocab_size"]
    quotients: dict[str, list[float]] = {"prefill": [], "decode": []}
    for number in range(-1, args.pairs):
        prompts = [
            [random.randrange(8, vocab) for _ in range(args.context)] for _ in range(args.requests)
        ]
        spent: dict[bool, tuple[float, float]] = {}
        for on in (False, True) if number % 2 else (True, False):
            for layer, check in zip(layers, checks, strict=True):
                layer.check = check if on else None
            spent[on] = answer(engine.llm_engine, prompts, args.tokens)
        print(number, spent, flush=True)
        if number >= 0:  # the first pair warms up
            for of_pairs, plain, checked in zip(
                quotients.values(), spent[False], spent[True], strict=True
            ):
                of_pairs.append(checked / plain)
    for name, of_pairs in quotients.items():
        low, middle, high = (100 * (pick(of_pairs) - 1) for pick in (min, statistics.median, max))
        print(f"{name}: {middle:+.1f} % ({low:+.1f} to {high:+.1f}, {len(of_pairs)} pairs)")


if __name__ == "__main__":
    main()
