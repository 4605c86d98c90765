"""Teacher-forced log-probabilities in bf16 and with fp8 caches, beside references that round alike.

bf16: the served model may be no further from the fp32 reference than BF16_FACTOR times
transformers' own bf16 is; both round at every module, in different orders. fp8: an fp32 model with
fp8 caches must equal the fp32 reference whose caches round to fp8 (dsa_testbed/rounding.py) up to
fp32 noise, except downstream of a value that noise carried across a rounding boundary. fp8 weights
are computed with in bf16, so they are bound as bf16 is, to the dequantised weights in fp32.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.hosts import HOSTS
from dsa_testbed.oracle import Forward, oracle_forward
from dsa_testbed.prompts import text_tokens

pytestmark = [pytest.mark.serving, pytest.mark.matrix]

POSITIONS = 2112
TOKENS = text_tokens(5_000, POSITIONS)
BF16_FACTOR = 1.5
Array = npt.NDArray[Any]


def forward(
    host: str, checkpoint: Path, settings: list[str], record: Path
) -> tuple[Array, list[Array]]:
    """Served log-probabilities of TOKENS[1:]; each layer's selection, [POSITIONS, index_topk]."""
    layers = load_config(checkpoint)["num_hidden_layers"]
    args, env = HOSTS[host].settings(*settings)
    env |= {"DSA_TEST_RECORD": str(record)}
    with HOSTS[host].server(checkpoint, args, env, mutation="record_selection") as server:
        for stale in record.iterdir():
            stale.unlink()
        logprobs = server.prompt_logprobs(TOKENS)
    calls = [np.load(path, allow_pickle=False) for path in sorted(record.iterdir())]
    selections = [np.concatenate(calls[layer::layers])[:POSITIONS] for layer in range(layers)]
    return np.array(logprobs), selections


def of_actual_tokens(reference: Forward) -> Array:
    return reference.logprobs[np.arange(POSITIONS - 1), TOKENS[1:]]


def overlap(selections: list[Array], reference: Forward) -> float:
    """Share of the reference's selected tokens that ours selected too, over all scored rows."""
    hits = total = 0
    for layer, theirs in reference.topk_indices.items():
        for ours_row, theirs_row in zip(selections[layer], theirs, strict=True):
            wanted = set(theirs_row[theirs_row >= 0].tolist())
            hits += len(wanted & set(ours_row[ours_row >= 0].tolist()))
            total += len(wanted)
    return hits / total


def error(values: Array, truth: Array) -> float:
    return float(np.sqrt(np.mean((values - truth) ** 2)))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("family", ["v32", "glm52"])
def test_bf16(host: str, family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(f"{family}-bf16")
    truth = oracle_forward(make_checkpoint(family), TOKENS)
    eager = oracle_forward(checkpoint, TOKENS, dtype="bfloat16")
    logprobs, selections = forward(host, checkpoint, ["bf16"], tmp_path)
    ours, theirs = (
        error(values, of_actual_tokens(truth)) for values in (logprobs, of_actual_tokens(eager))
    )
    shared = overlap(selections, truth)
    eager_shared = overlap(
        [eager.topk_indices.get(layer, np.empty((0, 0))) for layer in range(len(selections))], truth
    )
    print(
        f"{host} {family} bf16, {POSITIONS - 1} positions: rms error of log-probabilities against "
        f"fp32 {ours:.4f}, transformers' bf16 {theirs:.4f}; top-k overlap {shared:.4f}, "
        f"transformers' {eager_shared:.4f}"
    )
    assert ours <= BF16_FACTOR * theirs
    assert 1 - shared <= BF16_FACTOR * (1 - eager_shared)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("family", ["v32", "glm52"])
def test_fp8_caches(host: str, family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(family)
    exact = oracle_forward(checkpoint, TOKENS)
    rounded = oracle_forward(checkpoint, TOKENS, fp8_caches=True)
    logprobs, selections = forward(host, checkpoint, ["exact", "fp8_caches"], tmp_path)
    difference = np.abs(logprobs - of_actual_tokens(rounded))
    effect = np.abs(of_actual_tokens(exact) - of_actual_tokens(rounded))
    shared = overlap(selections, rounded)
    report = {
        "median difference": float(np.median(difference)),
        "rms difference": error(logprobs, of_actual_tokens(rounded)),
        "largest difference": float(difference.max()),
        "median effect of fp8": float(np.median(effect)),
        "rms effect of fp8": error(of_actual_tokens(exact), of_actual_tokens(rounded)),
        "top-k overlap": shared,
        "top-k overlap of fp8 with fp32": overlap(selections, exact),
    }
    print(f"{host} {family} fp8 caches, {POSITIONS - 1} positions: {json.dumps(report)}")
    # What fp8 changes is seen, and all but a small part of it is the reference's change too.
    assert report["median difference"] <= 0.1 * report["median effect of fp8"]
    assert report["rms difference"] <= 0.5 * report["rms effect of fp8"]
    assert shared >= 0.995


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="vLLM's fp8 linear layers need AMX on a CPU: it refuses these checkpoints itself",
)
def test_fp8_checkpoint() -> None:
    """Block-quantised weights, as DeepSeek releases them: as near to what they mean as bf16 is."""
    dequantised = make_checkpoint("v32-fp8_dequant")
    truth = of_actual_tokens(oracle_forward(dequantised, TOKENS))
    theirs = of_actual_tokens(oracle_forward(dequantised, TOKENS, dtype="bfloat16"))
    unquantised = of_actual_tokens(oracle_forward(make_checkpoint("v32"), TOKENS))
    args, env = HOSTS["vllm"].settings("bf16")
    with HOSTS["vllm"].server(make_checkpoint("v32-fp8"), args, env) as server:
        ours = np.array(server.prompt_logprobs(TOKENS))
    print(
        f"vllm v32 fp8 weights, {POSITIONS - 1} positions: rms error of log-probabilities against "
        f"fp32 of the dequantised weights {error(ours, truth):.4f}, transformers' bf16 "
        f"{error(theirs, truth):.4f}; quantising them changes {error(unquantised, truth):.4f}"
    )
    assert error(ours, truth) <= BF16_FACTOR * error(theirs, truth)
    assert error(ours, truth) < error(ours, unquantised)
