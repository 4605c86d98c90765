"""What vLLM's users do besides serving a checkpoint as it is, against transformers' tokens."""

import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.engine import generate, in_engine
from dsa_testbed.oracle import oracle_generate
from dsa_testbed.prompts import text_tokens

pytestmark = pytest.mark.serving

MAX_TOKENS = 16


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_ds_mla"])
def test_names_of_the_fp8_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from dsa_plugin.hosts.vllm import config_hook

    said: list[str] = []
    monkeypatch.setattr(config_hook._logger, "info", lambda text, *args: said.append(text % args))
    load_general_plugins()
    args = EngineArgs(model=str(make_checkpoint("v32")), kv_cache_dtype=name)
    assert args.create_engine_config().cache_config.cache_dtype == "fp8_ds_mla"
    named = [line for line in said if line.startswith(f"--kv-cache-dtype {name} is fp8_ds_mla")]
    assert len(named) == (name != "fp8_ds_mla")


def test_a_context_longer_than_the_config_says() -> None:
    """The table of cosines covers what the engine was made to accept."""
    model = make_checkpoint("glm5", max_position_embeddings=256)
    prompts = [text_tokens(0, 1029), text_tokens(500, 250)]
    env = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    served = in_engine(generate, model, env=env, prompts=prompts, max_tokens=MAX_TOKENS)
    assert served == oracle_generate(model, prompts, MAX_TOKENS)
