"""An indexer for a checkpoint without one: a tiny random DeepSeek-V3, as transformers saves it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsa_plugin.training.adapt import Adaptation, adapt
from dsa_plugin.training.checkpoint import IndexerSizes, load_checkpoint
from dsa_plugin.training.history import read_history
from dsa_plugin.training.lessons import Lesson
from dsa_plugin.training.run import Settings
from dsa_testbed import small_models, tokenizer

TOPK = 32
INDEXER = IndexerSizes(heads=4, topk=TOPK)
VOCAB = 512
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With experts, groups of them, and YaRN."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    folder = tmp_path_factory.mktemp("dense")
    config = small_models.small_model(
        "v32",
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=VOCAB,
    ).config
    config = {key: value for key, value in config.items() if not key.startswith("index_")}
    config |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand(buffer.shape))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(folder, VOCAB, 1024)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "alice.jsonl"
    lines = tokenizer.shipped_text()[:20000].split("\n\n")
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture(scope="module")
def warmed(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warmup")
    lesson = Lesson(128, 1, 30, 3e-3)
    adapt(Adaptation("warmup", dense, [text], lesson, INDEXER), Settings(folder, CPU))
    return folder


def logits(folder: Path, tokens: torch.Tensor) -> Any:
    from transformers import DeepseekV32ForCausalLM  # no Auto class: vLLM maps the type otherwise

    model = DeepseekV32ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_a_loaded_model_has_its_logits(dense: Path) -> None:
    """Dense ones, of a DeepSeek-V3 with experts and YaRN."""
    tokens = torch.randint(0, VOCAB, (1, 90), generator=torch.Generator().manual_seed(1))
    model = load_checkpoint(dense, INDEXER, seed=0).model
    with torch.no_grad():
        mine = model.lm_head(model(tokens).hidden)
    torch.testing.assert_close(mine, logits(dense, tokens), atol=3e-4, rtol=3e-4)


def test_warmup_trains_the_indexer_alone(dense: Path, warmed: Path) -> None:
    before, after = (
        load_file(folder / "model.safetensors") for folder in (dense, warmed / "model")
    )
    added = {name for name in after if ".indexer." in name}
    assert set(after) == set(before) | added
    assert len(added) == 2 * 5
    assert all(torch.equal(before[n].to(after[n].dtype), after[n]) for n in before)
    kl = [float(row["kl"]) for row in read_history(warmed)]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])


def test_the_result_is_a_v32_checkpoint(warmed: Path) -> None:
    """transformers loads it and selects as this package's model does."""
    config = json.loads((warmed / "model" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
    assert (config["index_topk"], config["index_n_heads"]) == (TOPK, INDEXER.heads)
    tokens = torch.randint(0, VOCAB, (1, 80), generator=torch.Generator().manual_seed(2))
    model = load_checkpoint(warmed / "model", IndexerSizes(), seed=9).model
    with torch.no_grad():
        mine = model.lm_head(model(tokens, sparse=True).hidden)
        dense = model.lm_head(model(tokens).hidden)
    torch.testing.assert_close(mine, logits(warmed / "model", tokens), atol=3e-4, rtol=3e-4)
    assert (mine - dense).abs().max() > 0.05


def test_sparse_stage_trains_both(warmed: Path, text: Path, tmp_path: Path) -> None:
    lesson = Lesson(96, 1, 4, 1e-3)
    work = Adaptation("sparse", warmed / "model", [text], lesson)
    out = adapt(work, Settings(tmp_path, CPU))
    before, after = (load_file(folder / "model.safetensors") for folder in (warmed / "model", out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".indexer.wk" in name for name in moved)
    assert any("kv_b_proj" in name for name in moved)
    assert all(row["kl"] and row["loss"] for row in read_history(tmp_path))


def test_the_sparse_stage_needs_an_indexer(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dsa train warmup"):
        adapt(Adaptation("sparse", dense, [text], Lesson(64, 1, 1, 1e-3)), Settings(tmp_path, CPU))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": 256}, "kv_lora_rank is 256.*512"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim is 32.*64"),
        ({"model_type": "llama"}, "llama.*deepseek_v3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"q_lora_rank": None}, "lacks q_lora_rank"),
        ({"hidden_size": 128}, "embed_tokens.weight.*64.*128"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], message: str, dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, INDEXER, seed=0)


def test_bad_data(dense: Path, tmp_path: Path) -> None:
    """Another suffix, a line without text, too little of it."""
    for name, content, message in (
        ("a.csv", "x", "csv is neither"),
        ("a.jsonl", '{"body": "x"}', "line 1.*text"),
        ("a.txt", "short", "fewer --tokens"),
    ):
        (tmp_path / name).write_text(content)
        work = Adaptation("warmup", dense, [tmp_path / name], Lesson(64, 1, 1, 1e-3), INDEXER)
        with pytest.raises(ValueError, match=message):
            adapt(work, Settings(tmp_path / "out", CPU))
