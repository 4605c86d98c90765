"""What cannot be served is refused by name, with the remedy, before a request is taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.server import ServerError, VllmServer

pytestmark = pytest.mark.serving

INDEXER = "model.layers.1.self_attn.indexer"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("v32")


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def edited(checkpoint: Path, target: Path, *, config: Edit = dict, weights: Edit = dict) -> Path:
    """A copy of the checkpoint with its config.json and its tensors changed in place."""
    shutil.copytree(checkpoint, target)
    numbers = json.loads((target / "config.json").read_text())
    config(numbers)
    (target / "config.json").write_text(json.dumps(numbers))
    if weights is not dict:
        tensors = load_file(target / "model.safetensors")
        weights(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def refusal(model: Path, **args: Any) -> str:
    """The message with which vLLM refuses to configure an engine for `model`."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=r".") as caught:
        EngineArgs(model=str(model), **args).create_engine_config()
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda c: c.update(index_topk=0), "index_topk is 0; allowed: an integer >= 1"),
        (lambda c: c.pop("index_n_heads"), "lacks index_n_heads"),
        (lambda c: [c.pop("index_topk"), c.pop("index_head_dim")], "lacks index_"),
        (lambda c: c.update(index_head_dim=64), "index_head_dim is 64; allowed: 128"),
        (lambda c: c.update(kv_lora_rank=256), "kv_lora_rank is 256; allowed: 512"),
    ],
    ids=["topk 0", "key missing", "two keys missing", "index dim", "latent dim"],
)
def test_config(checkpoint: Path, tmp_path: Path, config: Edit, expected: str) -> None:
    assert expected in refusal(edited(checkpoint, tmp_path / "model", config=config))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            lambda w: w.pop(f"{INDEXER}.weights_proj.weight"),
            f"{INDEXER}.weights_proj.weight is missing; expected shape [",
        ),
        (
            lambda w: w.update(
                {f"{INDEXER}.k_norm.bias": w[f"{INDEXER}.k_norm.bias"][:64].clone()}
            ),
            f"{INDEXER}.k_norm.bias has shape [64]; expected [128]",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith(INDEXER)],
            "(5 faults)",
        ),
    ],
    ids=["half of a fused weight", "misshapen", "whole indexer"],
)
def test_indexer_weights(checkpoint: Path, tmp_path: Path, weights: Edit, expected: str) -> None:
    message = refusal(edited(checkpoint, tmp_path / "model", weights=weights))
    assert expected in message
    assert "Download the checkpoint again" in message


@pytest.mark.parametrize("keep", [4, 1000, 0.5, 0.999])
def test_truncated_safetensors(checkpoint: Path, tmp_path: Path, keep: float) -> None:
    model = edited(checkpoint, tmp_path / "model")
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    message = refusal(model)
    assert str(path) in message
    assert "Download it again" in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "as fp8_ds_mla (656 bytes a token)"),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "--kv-cache-dtype bfloat16 with a"),
        (
            {"tensor_parallel_size": 3},
            "tensor parallel size 3 does not divide num_attention_heads=4",
        ),
        ({"max_model_len": 1 << 20}, "max_model_len"),
    ],
)
def test_arguments(checkpoint: Path, args: dict[str, Any], expected: str) -> None:
    assert expected in refusal(checkpoint, **args)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "DSA_INDEX_CACHE_DTYPE",
            "int4",
            "DSA_INDEX_CACHE_DTYPE='int4'; allowed: auto, model, fp8",
        ),
        ("DSA_LOGITS_WORKSPACE_MB", "0", "allowed: an integer >= 1"),
        ("DSA_INDEX_CACHE_DTPYE", "fp8", "did you mean DSA_INDEX_CACHE_DTYPE?"),
    ],
)
def test_environment(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    assert expected in refusal(checkpoint)


def test_block_size_of_the_fp8_index_cache(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSA_INDEX_CACHE_DTYPE", "fp8")
    message = refusal(checkpoint, block_size=32)
    assert "--block-size 32: pages of the fp8 index cache hold 64 tokens" in message


def test_a_server_ends_with_the_reason(checkpoint: Path) -> None:
    """The same through `vllm serve`, with the one variable that is read at registration."""
    with pytest.raises(ServerError) as caught, VllmServer(checkpoint, env={"DSA_PLUGIN": "yes"}):
        pass
    assert "DSA_PLUGIN='yes'; allowed: auto, on, off" in str(caught.value)


def test_pipeline_stage_without_a_selection() -> None:
    """glm52's layers are full, full, shared ...: a stage may not start at a shared one."""
    message = refusal(make_checkpoint("glm52"), pipeline_parallel_size=2)
    assert "--pipeline-parallel-size 2: stage 1 would start at layer 3" in message
