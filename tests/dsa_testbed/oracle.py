"""Reference answers: transformers, eager attention, greedy, in a process of its own.

Its own process because importing vLLM maps model type deepseek_v32 to the dense DeepseekV3Config.
Answers are kept on disk under a hash of the checkpoint's files, the tokens, the dtype and the
version of transformers; asking again costs nothing, and an interrupted run goes on where it was.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsa_testbed.cache import cache_root, digest, file_digest
from dsa_testbed.checkpoint import load_config

Tokens = list[int]


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of one prompt, and how far each was ahead of the second best (logits)."""

    tokens: Tokens
    gaps: list[float]


@dataclass(frozen=True)
class Forward:
    """Teacher-forced pass over T tokens.

    logprobs: [T, vocab] fp32. topk_indices: layer -> [T, index_topk] int32, what that layer's
    indexer chose, -1 padded and in no order; empty for a dense model.
    """

    logprobs: npt.NDArray[np.float32]
    topk_indices: dict[int, npt.NDArray[np.int32]]


def oracle_generate(
    checkpoint: Path, prompts: Sequence[Tokens], max_tokens: int, *, dtype: str = "float32"
) -> list[Tokens]:
    """The reference's greedy tokens, ``max_tokens`` for each prompt."""
    return [a.tokens for a in oracle_answers(checkpoint, prompts, max_tokens, dtype=dtype)]


def oracle_answers(
    checkpoint: Path, prompts: Sequence[Tokens], max_tokens: int, *, dtype: str = "float32"
) -> list[Answer]:
    """As oracle_generate, with the margin of each token."""
    keys = [{"mode": "generate", "tokens": list(p), "max_tokens": max_tokens} for p in prompts]
    return [
        Answer(**json.loads(path.read_text())) for path in _answer_files(checkpoint, keys, dtype)
    ]


def oracle_forward(
    checkpoint: Path, tokens: Tokens, *, dtype: str = "float32", fp8_caches: bool = False
) -> Forward:
    """The reference's log-probabilities at every position, and what its indexers selected.

    fp8_caches: round what is cached, and the indexer's queries, to fp8 (rounding.py).
    """
    # The answer depends on that file, too.
    rounding = fp8_caches and file_digest(Path(__file__).with_name("rounding.py"))
    key = {"mode": "forward", "tokens": tokens, "fp8_caches": rounding}
    [path] = _answer_files(checkpoint, [key], dtype)
    with np.load(path, allow_pickle=False) as arrays:
        topk = {int(k.removeprefix("topk_")): arrays[k] for k in arrays if k.startswith("topk_")}
        return Forward(arrays["logprobs"], topk)


def oracle_logprobs(
    checkpoint: Path, tokens: Tokens, *, dtype: str = "float32"
) -> npt.NDArray[np.float32]:
    """[T, vocab] log-probabilities of the next token at every position of ``tokens``."""
    return oracle_forward(checkpoint, tokens, dtype=dtype).logprobs


@cache
def _checkpoint_digest(checkpoint: Path) -> str:
    files = [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
    return digest(*(file_digest(file) for file in files))


def _answer_files(checkpoint: Path, keys: list[dict[str, Any]], dtype: str) -> list[Path]:
    """One file for each key; what the cache lacks is computed."""
    if load_config(checkpoint).get("quantization_config"):
        raise ValueError(
            f"{checkpoint.name} is quantised, which the reference cannot run on a CPU: ask for the "
            "checkpoint with the same values in fp32, <family>-fp8_dequant"
        )
    versions = [importlib.metadata.version("transformers"), dtype]
    # Without the key of the checkpoint's model: the same weights keep their answers.
    name = checkpoint.name.rpartition("-")[0] or checkpoint.name
    folder = cache_root() / "oracle" / f"{name}-{_checkpoint_digest(checkpoint)}"
    suffix = {"generate": ".json", "forward": ".npz"}
    paths = [folder / (digest(versions, key) + suffix[key["mode"]]) for key in keys]
    missing = {path: key for path, key in zip(paths, keys, strict=True) if not path.exists()}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [key | {"file": str(path)} for path, key in missing.items()]
        _run(checkpoint, dtype, jobs)
    return paths


def _run(checkpoint: Path, dtype: str, jobs: list[dict[str, Any]]) -> None:
    """Share the jobs among single-threaded processes: short steps gain nothing from threads."""
    package = Path(__file__).resolve().parents[1]
    search = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, len(jobs))
    env = os.environ | {
        "PYTHONPATH": search,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(cores // workers),
        # Score buffers are hundreds of MB and live for one operation. Returned to the kernel each
        # time, their page faults cost more than the arithmetic.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    }
    jobs = sorted(jobs, key=lambda job: len(job["tokens"]), reverse=True)
    with tempfile.TemporaryDirectory() as scratch:
        processes = []
        for worker in range(workers):
            path = Path(scratch) / f"{worker}.json"
            request = {"checkpoint": str(checkpoint), "dtype": dtype, "jobs": jobs[worker::workers]}
            path.write_text(json.dumps(request))
            command = [sys.executable, "-m", "dsa_testbed.reference", str(path)]
            processes.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL))
        codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(
            f"the reference stopped with exit codes {codes} (its output is above); "
            f"checkpoint {checkpoint}"
        )
