"""The registry: which model wants which variant, and index sharing between layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_registry import (
    all_entries,
    lookup,
    lookup_architecture,
    models,
    resolve_indexer_types,
    why_not,
)


def test_file_name_is_model_type() -> None:
    files = {path.stem for path in Path(models.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {entry.model_type for entry in all_entries()}
    assert all(lookup(entry.model_type) == entry for entry in all_entries())


def test_indexer_rope_is_the_models_own() -> None:
    assert lookup("deepseek_v32").indexer_rope_interleave is False
    assert lookup("glm_moe_dsa").indexer_rope_interleave is True


def test_kernels_are_tested_and_timed_at_the_models_sizes() -> None:
    from dsa_kernels.testing import GLM_5, INDEX_TOPK, V32

    for model, model_type in ((V32, "deepseek_v32"), (GLM_5, "glm_moe_dsa")):
        for checkpoint in lookup(model_type).checkpoints:
            assert model.num_attention_heads == checkpoint.num_attention_heads
            assert model.head_dim == checkpoint.qk_nope_head_dim + checkpoint.qk_rope_head_dim
            assert model.v_head_dim == checkpoint.v_head_dim
            assert model.index_n_heads == checkpoint.index_n_heads
            assert checkpoint.index_topk == INDEX_TOPK


def test_unknown_model_type_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"'deepseek_v3'.*known: deepseek_v32, glm_moe_dsa"):
        lookup("deepseek_v3")


@pytest.mark.parametrize("name", ["glm5_next", "zai-org/GLM-5.3-Flash", "GLM-5.3-Flash-FP8"])
def test_a_model_of_another_kind_says_what_it_would_need(name: str) -> None:
    assert "GLM-5.3-Flash is not served by this plugin: it scores pools" in str(why_not(name))
    assert why_not("zai-org/GLM-5.3") is None
    with pytest.raises(ValueError, match="needs an indexer, caches and a model of its own"):
        lookup("glm5_next")


def test_model_type_is_never_a_path() -> None:
    with pytest.raises(ValueError, match="not a DSA model"):
        lookup("..schema")


def test_lookup_architecture() -> None:
    assert lookup_architecture("DeepseekV32ForCausalLM") is lookup("deepseek_v32")
    assert lookup_architecture("GlmMoeDsaForCausalLM") is lookup("glm_moe_dsa")
    with pytest.raises(ValueError, match="known: DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM"):
        lookup_architecture("LlamaForCausalLM")
    with pytest.raises(ValueError, match="shared by deepseek_v32, glm_moe_dsa"):
        lookup_architecture("DeepseekV32MTPModel")


def test_glm_5_2_has_21_indexers() -> None:
    glm_5, glm_5_2, glm_5_3 = lookup("glm_moe_dsa").checkpoints
    assert set(glm_5.indexer_types) == {"full"}
    assert glm_5_3.indexer_types == glm_5_2.indexer_types
    full = [i for i, kind in enumerate(glm_5_2.indexer_types) if kind == "full"]
    assert full == [0, 1, 2, *range(6, 78, 4)]
    assert len(full) == 21


# Real checkpoints are loaded by these classes. Asked in a process of its own, since vLLM, once
# imported, replaces some of them.
_ASK_TRANSFORMERS = """
import json, sys
from transformers import DeepseekV32Config, GlmMoeDsaConfig
cases = json.loads(sys.argv[1])
print(json.dumps({
    "deepseek_v32": DeepseekV32Config().to_dict(),
    "glm_moe_dsa": GlmMoeDsaConfig().to_dict(),
    "sharing": [GlmMoeDsaConfig(num_hidden_layers=n, **kw).indexer_types for n, kw in cases],
}))
"""


def test_agrees_with_transformers() -> None:
    pytest.importorskip("transformers", minversion="5.16")
    cases: list[tuple[int, dict[str, object]]] = [
        (9, {}),
        (9, {"index_topk_freq": 4}),
        (78, {"index_topk_freq": 4, "index_skip_topk_offset": 3}),
        (7, {"index_topk_freq": 3, "index_skip_topk_offset": 1}),
        (6, {"index_topk_pattern": "FSSFSF", "index_topk_freq": 2}),
        (3, {"indexer_types": ["full", "full", "shared"], "index_topk_pattern": "FSF"}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", _ASK_TRANSFORMERS, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    for entry in all_entries():
        published = entry.checkpoints[0]
        for key, value in theirs[entry.model_type].items():
            if key != "index_topk_freq" and hasattr(published, key) and key != "indexer_types":
                assert getattr(published, key) == value, (entry.model_type, key)
    for (layers, keys), expected in zip(cases, theirs["sharing"], strict=True):
        assert list(resolve_indexer_types(layers, **keys)) == expected  # type: ignore[arg-type]


def test_precedence() -> None:
    keys = {"index_topk_freq": 2, "index_skip_topk_offset": 1}
    assert resolve_indexer_types(4, **keys) == ("full", "shared", "full", "shared")  # type: ignore[arg-type]
    by_pattern = resolve_indexer_types(4, index_topk_pattern="FFSS", index_topk_freq=2)
    assert by_pattern == ("full", "full", "shared", "shared")
    by_types = resolve_indexer_types(
        2, indexer_types=["full", "full"], index_topk_pattern="FS", index_topk_freq=9
    )
    assert by_types == ("full", "full")
    assert resolve_indexer_types(3, index_topk_pattern=["F", "S", "full"])[1:] == ("shared", "full")


@given(
    layers=st.integers(1, 100),
    freq=st.integers(1, 12),
    offset=st.integers(1, 12),
)
def test_frequency_means_one_indexer_in_freq(layers: int, freq: int, offset: int) -> None:
    types = resolve_indexer_types(layers, index_topk_freq=freq, index_skip_topk_offset=offset)
    assert len(types) == layers
    assert set(types[:offset]) == {"full"}  # the formula's clamp: the first `offset` layers
    full = [i for i, kind in enumerate(types) if kind == "full" and i >= offset - 1]
    assert full == list(range(offset - 1, layers, freq))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"indexer_types": ["full", "ful"]}, r"indexer_types\[1\] is 'ful'; allowed"),
        ({"indexer_types": ["full"]}, r"indexer_types has 1 entries for num_hidden_layers=2"),
        ({"indexer_types": ["shared", "full"]}, r"layer 0 would be 'shared'.*make the first"),
        ({"indexer_types": 4}, r"indexer_types is 4; allowed"),
        ({"index_topk_pattern": "FX"}, r"index_topk_pattern\[1\] is 'X'"),
        ({"index_topk_pattern": "FSS"}, r"3 entries for num_hidden_layers=2"),
        ({"index_topk_pattern": "SF"}, r"layer 0 would be 'shared'"),
        ({"index_topk_freq": 0}, r"index_topk_freq is 0; allowed: an integer >= 1"),
        ({"index_topk_freq": "4"}, r"index_topk_freq is '4'"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": -1}, r"offset is -1; allowed"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, r"index_skip_topk_offset >= 1"),
    ],
)
def test_bad_sharing(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_indexer_types(2, **keys)  # type: ignore[arg-type]
