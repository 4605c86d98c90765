"""Our Triton kernels inside a live server: on a CPU, by Triton's interpreter, exact as all else.

An interpreted tile takes some ten milliseconds, so the model and its prompts are the smallest that
take every way: a prompt that selects all of its tokens, and some that score theirs, over a page's
end too, in prefill and in decode; of the prefills one in the masked form, and of the rows some in
parts, as much longer ones are (mutations.py, `record_kernels`).
"""

from importlib import import_module
from pathlib import Path

import pytest

import dsa_kernels
from dsa_kernels.arch import INTERPRETED
from dsa_plugin.attention.op_counts import OPS
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.exactness import mismatches
from dsa_testbed.hosts import HOSTS
from dsa_testbed.prompts import Prompt, text_tokens
from dsa_testbed.server import op_counts


def all_kernels() -> set[str]:
    """Names of all kernels there are: those that `ci/compile` compiles."""
    files = Path(dsa_kernels.__path__[0]).glob("*/*kernel.py")
    modules = [import_module(f"dsa_kernels.{file.parent.name}.{file.stem}") for file in files]
    return {
        launch.kernel.__name__
        for module in modules
        for _, launch in module.compile_cases(INTERPRETED)
    }


@pytest.mark.serving
@pytest.mark.matrix
@pytest.mark.parametrize("host", HOSTS)
def test_every_kernel_runs_and_tokens_equal_the_reference(host: str, tmp_path: Path) -> None:
    # 64 are four tiles of the attention, which one row's decode splits.
    checkpoint = make_checkpoint("v32", index_topk=64, num_hidden_layers=2)
    prompts = [Prompt(f"text-{n}", text_tokens(37 * n, n)) for n in (10, 70, 100)]
    args, env = HOSTS[host].settings("exact")
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    env |= {
        "TRITON_INTERPRET": "1",
        "DSA_KERNELS": "triton",
        "DSA_CHECK": "1",
        "DSA_OP_COUNTS": str(tmp_path / "ops"),
        "DSA_TEST_RECORD": str(kernels),
    }
    with HOSTS[host].server(checkpoint, args, env, mutation="record_kernels") as server:
        alone = mismatches(server, checkpoint, prompts, 4, 1)
        assert not alone, "\n".join(alone)
        together = mismatches(server, checkpoint, prompts, 4)
        assert not together, "\n".join(together)
        counts = op_counts(tmp_path / "ops")
    print(f"{host}: {dict(counts)}")
    assert {op for op, count in counts.items() if count} == set(OPS)
    assert {path.name for path in kernels.iterdir()} == all_kernels()
