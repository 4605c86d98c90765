"""The trainable model has the names and the logits of transformers' DeepseekV32ForCausalLM."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dsa_plugin.training.export import deepseek_v32_config
from dsa_plugin.training.initialise import initialise
from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.sizes import ModelSizes

TOPK = 64


@pytest.fixture(scope="module")
def model() -> DsaModel:
    model = DsaModel(ModelSizes(vocab_size=320, num_hidden_layers=2, index_topk=TOPK))
    initialise(model, 3)
    with torch.no_grad():
        # Past its start: norms that scale and an index key with a bias.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif name.endswith("lm_head.weight"):
                parameter.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def theirs(model: DsaModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Named, no Auto class: importing vLLM maps deepseek_v32 to another model there.
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    folder: Path = tmp_path_factory.mktemp("hf")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    DeepseekV32Config(**deepseek_v32_config(model.sizes)).save_pretrained(folder)
    load: Any = DeepseekV32ForCausalLM.from_pretrained
    loaded, notes = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    return loaded.eval()


@pytest.mark.parametrize("length", [TOPK // 2, TOPK, 3 * TOPK])
@torch.no_grad()
def test_logits(model: DsaModel, theirs: Any, length: int) -> None:
    """Sparse ones; up to index_topk tokens these are dense ones."""
    tokens = torch.randint(0, 320, (2, length), generator=torch.Generator().manual_seed(length))
    mine = model.lm_head(model(tokens, sparse=True).hidden)
    torch.testing.assert_close(mine, theirs(tokens).logits, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_dense_logits(model: DsaModel, theirs: Any) -> None:
    """Of a longer text, with a top-k that leaves nothing out; they are not the sparse ones."""
    tokens = torch.randint(0, 320, (1, 3 * TOPK), generator=torch.Generator().manual_seed(1))
    dense = model.lm_head(model(tokens).hidden)
    for layer in theirs.model.layers:
        layer.self_attn.indexer.index_topk = 3 * TOPK
    torch.testing.assert_close(dense, theirs(tokens).logits, atol=2e-4, rtol=2e-4)
    for layer in theirs.model.layers:
        layer.self_attn.indexer.index_topk = TOPK
    assert (dense - theirs(tokens).logits).abs().max() > 0.1
