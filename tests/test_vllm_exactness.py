"""`vllm serve` through the plugin equals transformers token for token, in fp32, on a CPU.

Each cell is one server. All of them chunk prompts at 256 tokens, answer 16 requests at once and
take prompts around index_topk (64), the page (64), the chunk and past 4,096 tokens; `tight` ones
have so few cache blocks that the host must preempt.
"""

from dataclasses import dataclass

import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.exactness import ARGS, ENV, MAX_TOKENS, mismatches
from dsa_testbed.prompts import ci_set, full_set, pressure_set
from dsa_testbed.server import VllmServer

# One 4,352-token request takes 68 blocks of 64. The pressure set starts in 80 and wants 96.
TIGHT = ["--num-gpu-blocks-override", "88"]
TWO_RANKS = ["-tp", "2"]
MTP = ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}']


@dataclass(frozen=True)
class Cell:
    family: str
    args: tuple[str, ...] = ()
    full: bool = True

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.family, *self._features(), "" if self.full else "ci"]))

    def _features(self) -> list[str]:
        known = {"-tp": "tp2", "--num-gpu-blocks-override": "tight", "--speculative-config": "mtp"}
        return [known[arg] for arg in self.args if arg in known]


FAMILIES = ("v32", "glm5", "glm52")
CELLS = [
    Cell("v32", tuple(TIGHT), full=False),
    Cell("glm52", tuple(TIGHT), full=False),
    *(Cell(family, tuple(TIGHT)) for family in FAMILIES),
    *(Cell(family, tuple(TWO_RANKS)) for family in FAMILIES),
    *(Cell(family, tuple(MTP)) for family in FAMILIES),
]


def _params() -> list[object]:
    marks = {True: (pytest.mark.serving, pytest.mark.matrix), False: (pytest.mark.serving,)}
    return [pytest.param(cell, id=cell.name, marks=marks[cell.full]) for cell in CELLS]


@pytest.mark.parametrize("cell", _params())
def test_tokens_equal_the_reference(cell: Cell) -> None:
    checkpoint = make_checkpoint(cell.family)
    prompts = full_set() if cell.full else ci_set()
    two_ranks = "-tp" in cell.args
    env = ENV | ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if two_ranks else {})
    with VllmServer(checkpoint, [*ARGS, *cell.args], env) as server:
        first = mismatches(server, checkpoint, prompts, MAX_TOKENS)
        assert not first, "\n".join(first)
        again = mismatches(server, checkpoint, prompts[::-1], MAX_TOKENS)
        assert not again, "\n".join(again)
        crowded = mismatches(server, checkpoint, pressure_set(), MAX_TOKENS)
        assert not crowded, "\n".join(crowded)
        metrics = server.metrics()
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    if "--num-gpu-blocks-override" in cell.args:
        assert metrics["vllm:num_preemptions_total"] > 0
    if "--speculative-config" in cell.args:
        assert metrics["vllm:spec_decode_num_draft_tokens_total"] > 0
