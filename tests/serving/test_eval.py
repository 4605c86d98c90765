"""`dsa eval` through a host answers as through transformers, and notices each fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_plugin.evaluation.results import Results
from dsa_plugin.training.tokenizer import VOCAB_SIZE, build_tokenizer
from dsa_testbed import checkpoint as checkpoints
from dsa_testbed.hosts import HOSTS
from dsa_testbed.mutations import FAULTS
from dsa_testbed.sglang_server import sglang_python
from dsa_testbed.small_models import small_model

ASKED = (
    *("--lengths", "768", "--kinds", "single,latest,count", "--questions", "2"),
    *("--max-gen-toks", "12", "--dtype", "float32"),
)
FLAGS = {
    "vllm": ["--enforce-eager", "--max-num-seqs", "4"],
    "sglang": ["--max-total-tokens", "8192", "--mem-fraction-static", "0.5"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and the tokenizer that exams are made for."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, "v32")
    return folder


def write(folder: Path, family: str) -> None:
    spec = small_model(family, vocab_size=VOCAB_SIZE, eos_token_id=0, num_nextn_predict_layers=0)
    checkpoints.write(spec, folder)
    build_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "transformers.json"
    run(sys.executable, str(checkpoint), "--variants", "dsa", "--out", str(out))
    return out


def run(python: str, *args: str, flags: list[str] | None = None) -> str:
    """Standard output of `dsa eval`, which has to end well."""
    done = evaluate(python, *args, flags=flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def evaluate(
    python: str, *args: str, flags: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "dsa_plugin.cli", "eval", *args, *ASKED]
    return subprocess.run(
        [*command, *(["--", *flags] if flags else [])],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.serving
@pytest.mark.parametrize("host", ["vllm", pytest.param("sglang", marks=pytest.mark.matrix)])
def test_a_host_answers_as_transformers(
    host: str, checkpoint: Path, reference: Path, tmp_path: Path
) -> None:
    python = sys.executable if host == "vllm" else str(sglang_python())
    out = tmp_path / "results.json"
    run(
        python,
        *(str(checkpoint), "--through", host, "--variants", "dsa"),
        *("--out", str(out), "--same-as", str(reference)),
        flags=FLAGS[host],
    )
    theirs, ours = Results.load(reference).cells, Results.load(out).cells
    assert [cell.answers for cell in ours] == [cell.answers for cell in theirs]
    assert ours[0].nll == pytest.approx(theirs[0].nll, rel=1e-6)


@pytest.mark.serving
@pytest.mark.matrix
@pytest.mark.parametrize(("family", "mutation"), FAULTS)
def test_a_mutation_fails_the_comparison(family: str, mutation: str, tmp_path: Path) -> None:
    write(tmp_path, family)
    reference, out = tmp_path / "reference.json", tmp_path / "results.json"
    run(sys.executable, str(tmp_path), "--variants", "dsa", "--out", str(reference))
    args, env = HOSTS["vllm"].settings("exact")
    if "short_prompt" in mutation:
        # Index keys of a chunk that sees no more than index_topk keys are needed by the next one.
        args += ["--max-num-batched-tokens", "64"]
    with HOSTS["vllm"].server(tmp_path, args, env, mutation=mutation) as server:
        done = evaluate(
            sys.executable,
            *("--url", server.base_url, "--out", str(out), "--same-as", str(reference)),
        )
    assert done.returncode == 1, done.stderr
    assert "FAIL dsa at 768" in done.stdout
