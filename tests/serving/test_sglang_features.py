"""What SGLang's users switch on, against transformers' tokens and selections."""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.hosts import HOSTS
from dsa_testbed.oracle import oracle_forward, oracle_generate
from dsa_testbed.prompts import text_tokens
from dsa_testbed.server import Server

pytestmark = pytest.mark.serving

MAX_TOKENS = 16
PROMPTS = [text_tokens(0, 700), text_tokens(500, 250)]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """Of fewer positions than the server below accepts."""
    return make_checkpoint("glm52", max_position_embeddings=256)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    args, env = HOSTS["sglang"].settings("exact")
    env |= {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    args += ["--enable-return-indexer-topk"]
    with HOSTS["sglang"].server(checkpoint, args, env) as running:
        yield running


def test_a_context_longer_than_the_config_says(server: Server, checkpoint: Path) -> None:
    """The host lengthens its table of cosines after the load; the plugin reads the longer one."""
    answers = server.generate_all(PROMPTS, MAX_TOKENS, ignore_eos=True)
    assert [a.tokens for a in answers] == oracle_generate(checkpoint, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize("attempt", ["prefilled", "from the radix cache"])
def test_selections_are_returned(server: Server, checkpoint: Path, attempt: str) -> None:
    """Of each layer, of each token but the last; a sharing layer's are those that it shares."""
    prompt = text_tokens(900, 300)
    sampling = {"temperature": 0, "max_new_tokens": MAX_TOKENS, "ignore_eos": True}
    request = {"input_ids": prompt, "sampling_params": sampling, "return_indexer_topk": True}
    answer = server.post("/generate", request)
    assert (answer["meta_info"]["cached_tokens"] > 0) == (attempt != "prefilled")
    tokens = prompt + answer["output_ids"][:-1]
    types = load_config(checkpoint)["indexer_types"]
    returned = np.frombuffer(base64.b64decode(answer["meta_info"]["indexer_topk"]), np.int32)
    returned = returned.reshape(len(tokens), len(types), -1)
    reference = oracle_forward(checkpoint, tokens).topk_indices
    full = 0
    for layer, kind in enumerate(types):
        full = layer if kind == "full" else full
        expected = np.sort(reference[full], axis=1)
        assert np.array_equal(np.sort(returned[:, layer], axis=1), expected), layer


@pytest.mark.parametrize("family", ["v32", "glm52"])
def test_pipeline_stages(family: str) -> None:
    """The second stage of glm52's begins with a layer that shares the first's last selection."""
    model = make_checkpoint(family)
    args, env = HOSTS["sglang"].settings("exact", "two_stages")
    with HOSTS["sglang"].server(model, args, env) as stages:
        answers = stages.generate_all(PROMPTS, MAX_TOKENS, ignore_eos=True)
    assert [a.tokens for a in answers] == oracle_generate(model, PROMPTS, MAX_TOKENS)
