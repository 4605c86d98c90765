"""What vLLM's users do besides serving a checkpoint as it is, against transformers' tokens."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dsa_testbed.adapter import RANK, adapter, with_adapter
from dsa_testbed.checkpoint import build, load_config, make_checkpoint, with_fp8_keys
from dsa_testbed.engine import (
    generate,
    generate_after_reload,
    generate_in_stages,
    generate_loaded_through_one_buffer,
    generate_through_a_store,
    generate_with_adapter,
    in_engine,
    through_a_store,
)
from dsa_testbed.oracle import oracle_generate
from dsa_testbed.prompts import text_tokens
from dsa_testbed.small_models import small_model

pytestmark = pytest.mark.serving

MAX_TOKENS = 16


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_ds_mla"])
def test_names_of_the_fp8_cache(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture
def fp8_key_projection(tmp_path: Path) -> tuple[Path, Path]:
    return with_fp8_keys(make_checkpoint("v32"), tmp_path)


def test_fp8_key_projection(fp8_key_projection: tuple[Path, Path]) -> None:
    """Whatever the loader does with its buffers while the host waits for the scale."""
    stored, meant = fp8_key_projection
    prompts = [text_tokens(0, 700), text_tokens(500, 250)]
    served = in_engine(
        generate_loaded_through_one_buffer,
        stored,
        {"load_format": "safetensors"},
        {"VLLM_MLA_DISABLE": "1"},  # of the host's own attention
        prompts=prompts,
        max_tokens=MAX_TOKENS,
    )
    assert served == oracle_generate(meant, prompts, MAX_TOKENS)


def test_reloaded_weights_keep_their_addresses() -> None:
    # Without experts, whose packed weights vLLM 0.32 reloads wrongly on a CPU.
    spec = small_model("glm52", first_k_dense_replace=6)
    model, other = build(spec), build(replace(spec, seed=1))
    prompts = [text_tokens(0, 700), text_tokens(500, 250)]
    served = in_engine(
        generate_after_reload, model, prompts=prompts, max_tokens=MAX_TOKENS, checkpoint=str(other)
    )
    assert served == oracle_generate(other, prompts, MAX_TOKENS)


def test_a_connector_stores_and_loads_both_caches(tmp_path: Path) -> None:
    model, prompt = make_checkpoint("v32"), text_tokens(0, 700)
    answers, stored = in_engine(
        generate_through_a_store,
        model,
        through_a_store(tmp_path),
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        store=str(tmp_path),
    )
    reference = oracle_generate(model, [prompt], MAX_TOKENS)[0]
    assert answers[0] == answers[1] == reference
    assert answers[2] != reference, "the stored index keys were not read"
    of_cache = {"attn": 576, "indexer.k_cache": 128}
    assert stored == {
        f"model.layers.{layer}.self_attn.{cache}": 640 * width * 4
        for layer in range(4)
        for cache, width in of_cache.items()
    }


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "partition"), [("v32", "2,2"), ("glm52", "2,4")])
def test_pipeline_stages(family: str, partition: str) -> None:
    model, prompts = make_checkpoint(family), [text_tokens(0, 700), text_tokens(500, 250)]
    env = {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_PP_LAYER_PARTITION": partition,
    }
    served = in_engine(
        generate_in_stages,
        model,
        {"pipeline_parallel_size": 2},
        env,
        prompts=prompts,
        max_tokens=MAX_TOKENS,
    )
    assert served == oracle_generate(model, prompts, MAX_TOKENS)


def test_lora(tmp_path: Path) -> None:
    """As the merged weights, on every projection that is one; the others' are refused by name."""
    # vLLM 0.32 has no experts for a CPU with LoRA.
    model = make_checkpoint("v32", first_k_dense_replace=4)
    served = {"q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj", "wq_b", "down_proj"}
    path, merged = with_adapter(model, served, tmp_path)
    tensors = load_file(model / "model.safetensors")
    refused = ["kv_b_proj", "wk", "weights_proj"]
    others = [str(adapter(tensors, {name}, tmp_path / name)) for name in refused]
    prompts = [text_tokens(0, 700), text_tokens(500, 250)]
    answers, said = in_engine(
        generate_with_adapter,
        model,
        {"enable_lora": True, "max_lora_rank": RANK},
        prompts=prompts,
        max_tokens=MAX_TOKENS,
        adapter=str(path),
        others=others,
    )
    assert answers == oracle_generate(merged, prompts, MAX_TOKENS)
    for name, message in zip(refused, said, strict=True):
        assert re.search(rf"received \['model\.layers\.0\.self_attn\.(indexer\.)?{name}'", message)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("family", "remedy"),
    [("v32", "index_topk"), ("glm5", "index_topk"), ("v32", "deepseek_v3")],
)
def test_dense_attention(family: str, remedy: str, tmp_path: Path) -> None:
    """Both ways that the refusal of index_topk 0 tells of."""
    everything = make_checkpoint(family, index_topk=2048)
    model, prompts = everything, [text_tokens(0, 700)]
    if remedy == "deepseek_v3":
        model = Path(shutil.copytree(make_checkpoint(family), tmp_path / "model"))
        config = {k: v for k, v in load_config(model).items() if not k.startswith("index_")}
        config |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
        (model / "config.json").write_text(json.dumps(config))
    # vLLM's own MLA needs AMX on a CPU.
    env = {"VLLM_MLA_DISABLE": "1"} if remedy == "deepseek_v3" else {}
    served = in_engine(generate, model, env=env, prompts=prompts, max_tokens=MAX_TOKENS)
    assert served == oracle_generate(everything, prompts, MAX_TOKENS)
