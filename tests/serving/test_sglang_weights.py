"""What SGLang's loader and its users' weight updates make of the indexers' weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsa_testbed.checkpoint import build, make_checkpoint, with_fp8_keys
from dsa_testbed.hosts import HOSTS
from dsa_testbed.oracle import oracle_generate
from dsa_testbed.prompts import text_tokens
from dsa_testbed.server import Server
from dsa_testbed.sglang_model import with_model
from dsa_testbed.small_models import small_model
from dsa_testbed.weights import dequantise_blocks, quantise_blocks

pytestmark = pytest.mark.serving

INDEXER = "model.layers.1.self_attn.indexer"
MAX_TOKENS = 16
PROJECTIONS = ("wk", "weights_proj")
Tensors = dict[str, Tensor]


def fused(weights: Tensors) -> Tensor:
    return torch.cat([weights[f"{INDEXER}.{name}.weight"] for name in PROJECTIONS]).float()


def stored_in_fp8(weights: Tensors) -> tuple[Tensors, Tensors]:
    """The projections with their scales, and what they mean."""
    stored, meant = {}, {}
    for name in PROJECTIONS:
        key = f"{INDEXER}.{name}.weight"
        stored[key], scale = quantise_blocks(weights[key].float())
        stored[f"{key}_scale_inv"] = scale
        meant[key] = dequantise_blocks(stored[key], scale)
    return stored, meant


def row_scales(weights: Tensors) -> tuple[Tensors, Tensors]:
    stored, meant = {}, {}
    for name in PROJECTIONS:
        key = f"{INDEXER}.{name}.weight"
        scale = weights[key].float().abs().amax(1, keepdim=True) / 448
        stored[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
        stored[f"{key}_scale"] = scale
        meant[key] = stored[key].float() * scale
    return stored, meant


UNKNOWN: list[tuple[Tensors, str]] = [
    (
        {f"{INDEXER}.weights_proj.weight_packed": torch.zeros(16, 32, dtype=torch.int32)},
        "weights_proj.weight_packed (torch.int32 [16, 32]): no parameter takes it",
    ),
    ({f"{INDEXER}.wq_b.qweight": torch.zeros(4, 4)}, "wq_b.qweight (torch.float32 [4, 4]): no"),
    ({f"{INDEXER}.k_norm.gamma": torch.ones(128)}, "k_norm.gamma (torch.float32 [128]): no"),
    ({f"{INDEXER}.wk.bias": torch.ones(128)}, "wk.bias (torch.float32 [128]): no parameter"),
    ({f"{INDEXER}.wk.weight": torch.ones(1, 256)}, "this indexer's is [128, 256]"),
    (
        {f"{INDEXER}.wk.weight": torch.ones(128, 256).to(torch.float8_e4m3fn)},
        f"without the other half of an fp8 weight: {INDEXER}.wk.weight",
    ),
    (
        {
            f"{INDEXER}.wk.weight": torch.ones(128, 256).to(torch.float8_e4m3fn),
            f"{INDEXER}.wk.weight_scale_inv": torch.ones(2, 2),
        },
        "a weight of shape [128, 256] has no such scales",
    ),
]
HARMLESS = {
    f"{INDEXER}.wk.bias": torch.zeros(128),
    f"{INDEXER}.rotary_emb.inv_freq": torch.ones(32),
    "model.layers.99.self_attn.indexer.k_norm.gamma": torch.ones(128),
}


def test_every_form_of_an_indexers_weights(tmp_path: Path) -> None:
    """A checkpoint's, then a trainer's; what no parameter takes is refused, and changes nothing."""
    model = make_checkpoint("v32-fp8")
    start = load_file(model / "model.safetensors")
    wk = f"{INDEXER}.wk.weight"
    start[wk] = dequantise_blocks(start[wk], start[f"{wk}_scale_inv"])
    other = {
        name: torch.randn_like(value, dtype=torch.bfloat16)
        for name, value in start.items()
        if name in {f"{INDEXER}.{projection}.weight" for projection in PROJECTIONS}
    }
    cases = [(other, other), stored_in_fp8(other), row_scales(other), (other, other)]
    trained = kv_b_proj(build(replace(small_model("v32-fp8"), seed=1)))
    updates = [stored for stored, _ in cases] + [HARMLESS, trained]
    taken = len(updates)
    updates += [stored for stored, _ in UNKNOWN]
    files = [str(tmp_path / f"update{number}.safetensors") for number in range(len(updates))]
    for file, tensors in zip(files, updates, strict=True):
        save_file(tensors, file)
    refusals, stayed = with_model(
        "after_updates", model, "--dtype", "bfloat16", updates=files, folder=str(tmp_path)
    )
    assert stayed
    expected = [fused(meant) for meant in (start, *(meant for _, meant in cases))]
    for number, weights in enumerate(expected):
        loaded = load_file(tmp_path / f"{number}.safetensors")
        torch.testing.assert_close(
            loaded["wk_weights_proj.weight"], weights.bfloat16(), rtol=0, atol=0
        )
    assert refusals[:taken] == [None] * taken
    for (_, message), refusal in zip(UNKNOWN, refusals[taken:], strict=True):
        assert message in refusal
    after, last = (load_file(tmp_path / f"{n}.safetensors") for n in (taken, len(updates)))
    assert all(torch.equal(last[name], after[name]) for name in after)
    heads = dequantise_blocks(*trained.values()).unflatten(0, (4, 256))
    for name, weights in (("w_uk", heads[:, :128]), ("w_uv", heads[:, 128:].mT)):
        error = (after[name].float() - weights).norm() / weights.norm()
        assert error < 0.05, (name, float(error))  # the host makes one fp8 scale of all blocks'


def kv_b_proj(model: Path) -> Tensors:
    """Of layer 1: the weight in fp8 and its scales."""
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    stored = load_file(model / "model.safetensors")
    return {key: stored[key] for key in (name, f"{name}_scale_inv")}


def test_a_drafts_indexer(tmp_path: Path) -> None:
    """Its layer comes after the model's in a checkpoint, and has another name in the host."""
    model = make_checkpoint("v32")
    file = tmp_path / "indexers.safetensors"
    draft = '{"architectures": ["DeepseekV3ForCausalLMNextN"]}'
    flags = ("--json-model-override-args", draft, "--attention-backend", "dsa_plugin")
    with_model("save_indexers", model, *flags, "--page-size", "64", file=str(file))
    loaded = load_file(file)
    stored = load_file(model / "model.safetensors")
    prefix = "model.layers.4.self_attn.indexer."
    expected = torch.cat([stored[f"{prefix}{name}.weight"] for name in PROJECTIONS])
    prefix = "model.decoder.self_attn.indexer."
    assert torch.equal(loaded[f"{prefix}wk_weights_proj.weight"], expected)
    assert len(loaded) == 4


def test_weights_reloaded_while_serving(tmp_path: Path) -> None:
    """A server's tokens are those of the weights that it was last given."""
    model = make_checkpoint("v32")
    other, meant = with_fp8_keys(build(replace(small_model("v32"), seed=1)), tmp_path)
    prompts = [text_tokens(0, 700), text_tokens(500, 250)]
    args, env = HOSTS["sglang"].settings("exact")

    def tokens(server: Server) -> list[list[int]]:
        answers = server.generate_all(prompts, MAX_TOKENS, ignore_eos=True)
        return [answer.tokens for answer in answers]

    with HOSTS["sglang"].server(model, args, env) as server:
        assert tokens(server) == oracle_generate(model, prompts, MAX_TOKENS)
        said = server.post("/update_weights_from_disk", {"model_path": str(other)})
        assert said["success"], said
        assert tokens(server) == oracle_generate(meant, prompts, MAX_TOKENS)
