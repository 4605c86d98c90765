"""vLLM drafts by the MTP layer beside what else it is asked for; transformers' tokens all the same.

That drafts are accepted says that the draft, too, has the weights and the caches that it should.
"""

from pathlib import Path

import pytest

from dsa_testbed.adapter import RANK, with_adapter
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.engine import (
    counting_drafts,
    generate_through_a_store,
    generate_with_adapter,
    in_engine,
    through_a_store,
)
from dsa_testbed.oracle import oracle_generate
from dsa_testbed.prompts import text_tokens

pytestmark = pytest.mark.serving

MAX_TOKENS = 32
PROMPTS = [text_tokens(0, 700), text_tokens(500, 250)]
MTP = {
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
    "disable_log_stats": False,
}


def test_an_adapter(tmp_path: Path) -> None:
    """Of the target alone: the draft guesses without it."""
    # vLLM 0.32 has no experts for a CPU with LoRA; the fifth layer is the draft's.
    model = make_checkpoint("v32", first_k_dense_replace=5)
    projections = {"q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj", "wq_b", "down_proj"}
    adapter, merged = with_adapter(model, projections, tmp_path)
    [answers, _], drafted, accepted = in_engine(
        counting_drafts,
        model,
        MTP | {"enable_lora": True, "max_lora_rank": RANK},
        then=generate_with_adapter.__name__,
        prompts=PROMPTS,
        max_tokens=MAX_TOKENS,
        adapter=str(adapter),
        others=[],
    )
    assert answers == oracle_generate(merged, PROMPTS, MAX_TOKENS)
    assert drafted > accepted > 0


def test_a_connector(tmp_path: Path) -> None:
    model, prompt = make_checkpoint("v32"), PROMPTS[0]
    [answers, stored], drafted, accepted = in_engine(
        counting_drafts,
        model,
        MTP | through_a_store(tmp_path),
        then=generate_through_a_store.__name__,
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        store=str(tmp_path),
    )
    reference = oracle_generate(model, [prompt], MAX_TOKENS)[0]
    assert answers[0] == answers[1] == reference
    assert answers[2] != reference, "the stored index keys were not read"
    assert {name.split(".")[2] for name in stored} == set("01234"), "the fifth is the draft's"
    assert drafted > accepted > 0
