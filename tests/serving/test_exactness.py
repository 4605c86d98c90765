"""A served model equals transformers token for token, in fp32, on a CPU, on either host.

Both hosts get the same prompts and are compared with the same reference, so that they also agree
with each other. Each cell is one server. All of them chunk prompts at 256 tokens unless they say
otherwise, answer 16 requests at once and take prompts around index_topk (64), the page (64), the
chunk and past 4,096 tokens; `tight` ones have so few cache pages that the host must take some away
from a running request (vLLM preempts, SGLang retracts).
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.exactness import MAX_TOKENS, mismatches
from dsa_testbed.hosts import HOSTS
from dsa_testbed.prompts import Prompt, ci_set, full_set, pressure_set, text_tokens
from dsa_testbed.server import op_counts

FAMILIES = ("v32", "glm5", "glm52")
NGRAM = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'


@dataclass(frozen=True)
class Cell:
    """A host, a family, which of Host's settings to add, and which flags of the host's own."""

    host: str
    family: str
    feature: str = ""
    flags: tuple[str, ...] = ()
    full: bool = True
    sequential: bool = False
    mutation: str | None = None

    @property
    def name(self) -> str:
        words = [self.host, self.family, self.feature, *self.flags, "" if self.full else "ci"]
        words += ["sequential"] * self.sequential + [self.mutation or ""]
        return " ".join(filter(None, words))


CELLS = [
    Cell("vllm", "v32", "tight", full=False),
    Cell("vllm", "glm52", "tight", full=False),
    Cell("sglang", "v32", "tight", full=False),
    Cell("sglang", "glm52", "mtp", full=False),
    # No GPU is needed to see that what a captured graph reads is right.
    Cell("sglang", "glm52", "mtp", full=False, mutation="decode_as_captured"),
    *(
        Cell(host, family, feature)
        for host in HOSTS
        for family in FAMILIES
        for feature in ("tight", "two_ranks", "mtp")
    ),
    *(Cell("sglang", family, "two_ranks_dp") for family in FAMILIES),
    *(Cell("sglang", family, sequential=True) for family in FAMILIES),
    Cell("vllm", "v32", flags=("--speculative-config", NGRAM), full=False),
    *(
        Cell("sglang", "v32", flags=flags, full=False)
        for flags in (
            ("--chunked-prefill-size", "64"),
            ("--chunked-prefill-size", "1024"),
            ("--enable-mixed-chunk",),
            ("--disable-overlap-schedule",),
            ("--disable-radix-cache",),
        )
    ),
]
# A few of the cells that take little are for every run.
IN_CI = {cell.name for cell in CELLS if not (cell.full or cell.flags or cell.mutation)}


def _params() -> list[object]:
    return [
        pytest.param(
            cell,
            id=cell.name,
            marks=[pytest.mark.serving, *([] if cell.name in IN_CI else [pytest.mark.matrix])],
        )
        for cell in CELLS
    ]


@pytest.mark.serving
@pytest.mark.parametrize("host", HOSTS)
def test_masked_prefill(host: str, tmp_path: Path) -> None:
    """Prefills in few large chunks take the masked form of attention, and the tokens stay right."""
    checkpoint = make_checkpoint("v32", index_topk=512)
    prompts = [Prompt(f"text-{n}", text_tokens(37 * n, n)) for n in (700, 1100, 1500, 2600)]
    args, env = HOSTS[host].settings("exact")
    chunk = {"vllm": "--max-num-batched-tokens", "sglang": "--chunked-prefill-size"}[host]
    env |= {"DSA_OP_COUNTS": str(tmp_path / "ops")}
    with HOSTS[host].server(checkpoint, [*args, chunk, "2048"], env) as server:
        wrong = mismatches(server, checkpoint, prompts, MAX_TOKENS)
        assert not wrong, "\n".join(wrong)
        counts = op_counts(tmp_path / "ops")
    assert counts["masked_mha"] > 0
    assert counts["sparse_mla"] > 0


@pytest.mark.parametrize("cell", _params())
def test_tokens_equal_the_reference(cell: Cell) -> None:
    host, checkpoint = HOSTS[cell.host], make_checkpoint(cell.family)
    prompts = full_set() if cell.full else ci_set()
    args, env = host.settings("exact", cell.feature)
    with host.server(checkpoint, [*args, *cell.flags], env, mutation=cell.mutation) as server:
        first = mismatches(server, checkpoint, prompts, MAX_TOKENS, 1 if cell.sequential else 16)
        assert not first, "\n".join(first)
        again = mismatches(server, checkpoint, prompts[::-1], MAX_TOKENS)
        assert not again, "\n".join(again)
        if cell.feature == "tight":
            crowded = mismatches(server, checkpoint, pressure_set(), MAX_TOKENS, None)
            assert not crowded, "\n".join(crowded)
        counters = server.counters()
    print(f"{cell.name}: {2 * len(prompts)} prompts, {counters}")
    assert (counters.cached_tokens > 0) == ("--disable-radix-cache" not in cell.flags)
    if cell.feature == "tight":
        assert counters.preemptions >= 4
    if cell.feature == "mtp":
        assert counters.draft_tokens > counters.accepted_draft_tokens > 0
