"""vLLM's Model Runner V2 gives the tokens of the first one.

The CPU build has V2 and no Triton backend, which V2 wants; here Triton's interpreter stands in.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_testbed.checkpoint import make_checkpoint

pytestmark = [pytest.mark.serving, pytest.mark.matrix]

_SERVE = """
import json, sys
from types import SimpleNamespace
from triton.backends import backends

if sys.argv[2] == "1":
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
from vllm import LLM, SamplingParams

from dsa_testbed.prompts import text_tokens

llm = LLM(
    sys.argv[1], dtype="float32", max_model_len=1024, max_num_batched_tokens=256, max_num_seqs=8
)
prompts = [{"prompt_token_ids": text_tokens(n, n)} for n in (20, 100, 300, 611)]
answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
tokens = [list(answer.outputs[0].token_ids) for answer in answers]
print("answer:", json.dumps([llm.llm_engine.vllm_config.use_v2_model_runner, tokens]))
"""


def serve(model: Path, runner: str) -> tuple[bool, list[list[int]]]:
    """Whether V2 ran, and each prompt's tokens."""
    env = {
        "DSA_KERNELS": "torch",
        "TRITON_INTERPRET": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": runner,
    }
    tests = Path(__file__).resolve().parents[1]
    path = f"{tests}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, str(model), runner],
        env=os.environ | env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("answer: "):
            ran, tokens = json.loads(line.removeprefix("answer: "))
            return ran, tokens
    raise AssertionError(done.stdout[-2000:] + done.stderr[-4000:])


def test_tokens_are_those_of_the_first_runner() -> None:
    model = make_checkpoint("v32")
    first, second = serve(model, "0"), serve(model, "1")
    assert (first[0], second[0]) == (False, True)
    assert second[1] == first[1]
