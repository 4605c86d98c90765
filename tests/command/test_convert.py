"""`dsa convert`: what becomes of each tensor, by other readers than its own."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from dsa_plugin.convert.formats import is_ignored
from dsa_plugin.convert.numbers import dequantise, quantise, unpack
from dsa_plugin.convert.plan import plan
from dsa_plugin.convert.run import Done, convert
from dsa_plugin.hosts.checkpoint import check_checkpoint
from dsa_testbed.shards import load_shards, write_shards
from dsa_testbed.small_models import small_model
from dsa_testbed.weights import dequantise_blocks

BITS = {"w8a16": 8, "w4a16": 4}
KEPT = re.compile(
    r"indexer|mlp\.gate\.|kv_b_proj|q_a_proj|kv_a_proj|embed_tokens|lm_head|eh_proj|shared_head|norm"
)


def run(source: Path, target: Path, precision: Any, workers: int = 2) -> Done:
    return convert(plan(source, target, precision), workers, lambda _: None)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3.2 with an MTP layer, in FP8 and in five files."""
    return write_shards(small_model("v32-fp8"), tmp_path_factory.mktemp("fp8") / "source", 5)


@pytest.fixture(scope="module")
def meant(fp8: Path) -> Mapping[str, Tensor]:
    """What the tensors of `fp8` mean, in fp32 where they are FP8."""
    stored = load_shards(fp8)
    return {
        name: dequantise_blocks(tensor, stored[f"{name}_scale_inv"])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


@pytest.fixture(scope="module", params=["w8a16", "w4a16"])
def quantised(
    request: pytest.FixtureRequest, fp8: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    target = tmp_path_factory.mktemp(request.param) / "target"
    run(fp8, target, request.param)
    return BITS[request.param], target


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (300, 130), (129, 257)])
def test_dequantised_element_by_element(shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = torch.arange(rows * columns).remainder(256).to(torch.uint8).view(shape)
    weight = weight.view(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) * 1e-3
    found = dequantise(weight, scales)
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        scale = scales[row // 128, column // 128].double()
        by_hand = (weight[row, column].double() * scale).float()
        assert torch.equal(found[row, column].nan_to_num(7.0), by_hand.nan_to_num(7.0))
    expected = dequantise_blocks(weight, scales)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_more_than_half_a_scale_off(bits: int) -> None:
    weight = torch.randn(64, 512) * torch.logspace(-30, 30, 64).unsqueeze(1)
    weight[3] = 0
    weight[4, :128] = -5.0  # all at the end of the range
    packed, scale = quantise(weight.clone(), bits)
    assert scale.dtype == torch.bfloat16
    error = (unpack(packed, scale, bits) - weight).abs().unflatten(1, (-1, 128)).amax(2)
    assert (error <= scale.float() * 0.5 * (1 + 2**-16)).all()
    assert not unpack(packed, scale, bits)[3].any()
    largest = weight.unflatten(1, (-1, 128)).abs().amax(2)
    assert (scale.float() * (2**bits - 1) / 2 <= largest * (1 + 2**-7) + (largest == 0) * 200).all()


def test_fp8_becomes_the_nearest_bf16(
    fp8: Path, meant: Mapping[str, Tensor], tmp_path: Path
) -> None:
    run(fp8, tmp_path / "bf16", "bf16")
    found = load_shards(tmp_path / "bf16")
    assert found.keys() == meant.keys()
    stored = load_shards(fp8)
    for name, tensor in found.items():
        was_fp8 = stored[name].dtype == torch.float8_e4m3fn
        assert tensor.dtype == (torch.bfloat16 if was_fp8 else stored[name].dtype)
        assert torch.equal(tensor, meant[name].to(tensor.dtype)), name
    before, after = (json.loads((f / "config.json").read_text()) for f in (fp8, tmp_path / "bf16"))
    del before["quantization_config"]
    assert after == before


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16])
def test_scales_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0, 2**-9], [4.0, 0.25, 1.0]])
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    save_file(
        {"a.weight": weight, "a.weight_scale_inv": scale.to(dtype)},
        tmp_path / "source" / "model.safetensors",
    )
    run(tmp_path / "source", tmp_path / "target", "bf16")
    found = load_shards(tmp_path / "target")["a.weight"]
    assert torch.equal(found, dequantise_blocks(weight, scale).bfloat16())


def test_packed_as_compressed_tensors_packs(
    quantised: tuple[int, Path], meant: Mapping[str, Tensor]
) -> None:
    """Its own compressor makes the same bits of the same scales; its decompressor reads them."""
    bits, target = quantised
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    found = load_shards(target)
    packed = [name.removesuffix("_packed") for name in found if name.endswith("_packed")]
    assert len(packed) == 5 * 2 + 3 + 4 * 3 * 9  # q_b and o, a dense MLP, eight experts and one
    for name in packed:
        state = {f"weight_{p}": found[f"{name}_{p}"] for p in ("packed", "scale", "shape")}
        again = PackedQuantizationCompressor.compress(
            {"weight": meant[name], "weight_scale": state["weight_scale"]}, scheme
        )
        assert {key: again[key].dtype for key in again} == {k: state[k].dtype for k in state}
        assert all(torch.equal(again[key], state[key]) for key in again), name
        read = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        own = unpack(state["weight_packed"], state["weight_scale"], bits)
        assert torch.equal(read.float(), own.to(read.dtype).float())
        relative = (own - meant[name]).norm() / meant[name].norm()
        assert relative < {4: 0.13, 8: 0.008}[bits]


def test_what_is_never_quantised(
    quantised: tuple[int, Path], fp8: Path, meant: Mapping[str, Tensor]
) -> None:
    """Indexers and routers above all: these are bf16, or the bytes they were."""
    found, stored = load_shards(quantised[1]), load_shards(fp8)
    kept = {name for name in meant if KEPT.search(name)}
    assert {name for name in meant if name in found} == kept
    assert any(".layers.4." in name and "indexer.wq_b" in name for name in kept)
    for name in kept:
        assert is_ignored(name.rpartition(".")[0]) or meant[name].ndim == 1
        assert torch.equal(found[name], meant[name].to(found[name].dtype)), name
        assert found[name].dtype in (stored[name].dtype, torch.bfloat16)


def test_bf16_sources_are_quantised_too(tmp_path: Path) -> None:
    source = write_shards(small_model("glm52-bf16"), tmp_path / "source", 2)
    run(source, tmp_path / "target", "w4a16")
    before, after = load_shards(source), load_shards(tmp_path / "target")
    for name in before.keys() - after.keys():
        found = unpack(after[f"{name}_packed"], after[f"{name}_scale"], 4)
        assert (found - before[name].float()).norm() < 0.13 * before[name].float().norm()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    with pytest.raises(ValueError, match="holds no FP8 weight"):
        plan(source, tmp_path / "bf16", "bf16")


def test_the_index_and_what_lies_beside(fp8: Path, tmp_path: Path) -> None:
    (fp8 / "encoding").mkdir(exist_ok=True)
    (fp8 / "encoding" / "encode.py").write_text("# of the release")
    (fp8 / "pytorch_model.bin").write_bytes(b"pickled")
    done = run(fp8, tmp_path / "target", "w4a16")
    (fp8 / "pytorch_model.bin").unlink()
    assert done.left_out == ["pytorch_model.bin"]
    target = tmp_path / "target"
    for name in ("tokenizer.json", "generation_config.json", "encoding/encode.py"):
        assert (target / name).read_bytes() == (fp8 / name).read_bytes()
    assert not (target / "pytorch_model.bin").exists()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = load_shards(target)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert set(index["weight_map"].values()) == {p.name for p in target.glob("*.safetensors")}


def test_hosts_take_the_indexers(quantised: tuple[int, Path]) -> None:
    """By the check that both hosts' adapters make before they load."""
    from dsa_plugin.config import DSAConfig
    from dsa_plugin.config_file import read_config

    check_checkpoint(
        quantised[1],
        DSAConfig.from_hf(read_config(quantised[1])),
        unquantised={"wq_b": False, "wk": False, "weights_proj": False},
    )
