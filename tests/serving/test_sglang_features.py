"""What SGLang's users switch on, against transformers' tokens and selections."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.hosts import HOSTS
from dsa_testbed.oracle import oracle_generate
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
    with HOSTS["sglang"].server(checkpoint, args, env) as running:
        yield running


def test_a_context_longer_than_the_config_says(server: Server, checkpoint: Path) -> None:
    """The host lengthens its table of cosines after the load; the plugin reads the longer one."""
    answers = server.generate_all(PROMPTS, MAX_TOKENS, ignore_eos=True)
    assert [a.tokens for a in answers] == oracle_generate(checkpoint, PROMPTS, MAX_TOKENS)
