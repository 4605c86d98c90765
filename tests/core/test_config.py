"""DSAConfig: what it reads, and what it refuses with which words."""

from types import SimpleNamespace
from typing import Any

import pytest

from dsa_plugin.config import DSAConfig
from dsa_registry import Checkpoint, all_entries, lookup


def hf_config(model_type: str = "deepseek_v32", **changes: Any) -> SimpleNamespace:
    """A small model's config.json as an object; a change to None removes the key."""
    keys = {
        "model_type": model_type,
        "num_attention_heads": 16,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
    } | changes
    return SimpleNamespace(**{key: value for key, value in keys.items() if value is not None})


def test_reads_every_number() -> None:
    config = DSAConfig.from_hf(hf_config())
    assert config == DSAConfig(
        model_type="deepseek_v32",
        num_attention_heads=16,
        hidden_size=256,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=2048,
        indexer_rope_interleave=False,
        indexer_types=("full",) * 4,
    )
    assert config.index_topk_pattern == "FFFF"
    assert DSAConfig.from_hf(vars(hf_config())) == config


@pytest.mark.parametrize("checkpoint", [c for e in all_entries() for c in e.checkpoints])
def test_accepts_every_released_checkpoint(checkpoint: Checkpoint) -> None:
    (entry,) = [e for e in all_entries() if checkpoint in e.checkpoints]
    given = SimpleNamespace(model_type=entry.model_type, **vars(checkpoint))
    config = DSAConfig.from_hf(given)
    assert config.indexer_types == checkpoint.indexer_types


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_indexer_rope_of_the_model_unless_the_config_says(model_type: str) -> None:
    own = lookup(model_type).indexer_rope_interleave
    assert DSAConfig.from_hf(hf_config(model_type)).indexer_rope_interleave is own
    for said in (True, False):
        given = hf_config(model_type, indexer_rope_interleave=said)
        assert DSAConfig.from_hf(given).indexer_rope_interleave is said


def test_draft_config_takes_the_targets_model_type() -> None:
    draft = hf_config("deepseek_mtp")
    with pytest.raises(ValueError, match="'deepseek_mtp'"):
        DSAConfig.from_hf(draft)
    assert DSAConfig.from_hf(draft, model_type="glm_moe_dsa").indexer_rope_interleave is True


def test_sharing_and_mtp_layers() -> None:
    config = DSAConfig.from_hf(hf_config(index_topk_freq=2))
    assert config.index_topk_pattern == "FFSF"
    assert [layer for layer in range(6) if config.has_indexer(layer)] == [0, 1, 3, 4, 5]


def test_an_ignored_sharing_key_is_said(caplog: pytest.LogCaptureFixture) -> None:
    full = ["full"] * 4
    DSAConfig.from_hf(hf_config(indexer_types=full, index_topk_freq=1))
    assert not caplog.records
    config = DSAConfig.from_hf(hf_config(indexer_types=full, index_topk_freq=2))
    assert config.index_topk_pattern == "FFFF"
    assert "index_topk_freq=2 is ignored, because indexer_types" in caplog.text


def test_all_missing_keys_at_once() -> None:
    given = hf_config(index_topk=None, index_head_dim=None, q_lora_rank=None)
    with pytest.raises(ValueError, match="lacks") as caught:
        DSAConfig.from_hf(given)
    for part in ("q_lora_rank", "index_topk=2048", "index_head_dim=128", "add what"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("index_topk", 0, "an integer >= 1"),
        ("index_topk", -5, "an integer >= 1"),
        ("index_topk", 64.0, "an integer >= 1"),
        ("index_topk", True, "an integer >= 1"),
        ("index_topk", "2048", "an integer >= 1"),
        ("index_head_dim", 64, "128"),
        ("kv_lora_rank", 256, "512"),
        ("kv_lora_rank", 512.0, "512"),
        ("qk_rope_head_dim", 0, "64"),
        ("index_n_heads", 0, "an integer >= 1"),
        ("index_n_heads", 129, "1 to 128"),
        ("num_attention_heads", 0, "an integer >= 1"),
        ("num_nextn_predict_layers", -1, "an integer >= 0"),
        ("indexer_rope_interleave", "yes", "true or false"),
        ("index_share_for_mtp_iteration", 1, "true or false"),
    ],
)
def test_bad_value_names_key_value_and_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        DSAConfig.from_hf(hf_config(**{key: value}))
    message = str(caught.value)
    assert message.startswith(f"{key} is {value!r}; allowed: {allowed}")
    assert any(remedy in message for remedy in ("restore", "leave it out", "needs a layout"))


def test_model_type_must_be_known_and_there() -> None:
    with pytest.raises(ValueError, match=r"'llama'.*known: deepseek_v32, glm_moe_dsa"):
        DSAConfig.from_hf(hf_config("llama"))
    with pytest.raises(ValueError, match="model_type is None"):
        DSAConfig.from_hf(SimpleNamespace())


def test_tensor_parallel() -> None:
    config = DSAConfig.from_hf(hf_config(num_attention_heads=12))
    for works in (1, 2, 3, 4, 6, 12):
        assert config.tensor_parallel_faults(works) == []
    for bad in (0, 5, 8, 24):
        [fault] = config.tensor_parallel_faults(bad)
        assert f"size {bad} does not divide num_attention_heads=12; use" in fault
        assert "1, 2, 4" in fault


@pytest.mark.parametrize("stages", range(1, 6))
def test_pipeline_partition(stages: int) -> None:
    """Of GLM-5.2's sharing over every number of layers: a split there is, or none."""
    for layers in range(1, 14):
        sharing = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
        model = hf_config("glm_moe_dsa", num_hidden_layers=layers, **sharing)
        config = DSAConfig.from_hf(model)
        partition = config.pipeline_partition(stages)
        assert (partition is None) == (stages > config.indexer_types.count("full"))
        if partition is None:
            continue
        assert sum(partition) == layers
        assert len(partition) == stages
        starts = [sum(partition[:stage]) for stage in range(stages)]
        assert [config.indexer_types[start] for start in starts] == ["full"] * stages


def test_pipeline_partition_of_the_release() -> None:
    sharing = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    config = DSAConfig.from_hf(hf_config("glm_moe_dsa", num_hidden_layers=78, **sharing))
    assert config.pipeline_partition(2) == [38, 40]
    assert config.pipeline_partition(4) == [18, 20, 20, 20]
