"""`dsa verify --quick`: what is wrong with files and config.json, and no word of those released."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsa_plugin.config import DSAConfig
from dsa_plugin.verification.findings import Finding, layers_text
from dsa_plugin.verification.headers import Header, Headers, attention_shapes
from dsa_plugin.verification.report import Report
from dsa_plugin.verification.run import check_files, check_folder, verify
from dsa_registry import all_entries
from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.released import write_config

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
INDEXER = "model.layers.1.self_attn.indexer."
Tensors = dict[str, Tensor]


def changed(source: Path, folder: Path, change: Callable[[Tensors], None], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors; keys of config.json that are None go."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    copy = Path(shutil.copytree(source, folder / "copy"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    settings = {k: v for k, v in (load_config(source) | config).items() if v is not None}
    (copy / "config.json").write_text(json.dumps(settings))
    return copy


def untouched(_tensors: Tensors) -> None:
    """No tensor changes."""


def wrong(report: Report) -> list[str]:
    return [str(finding) for finding in report.findings if finding.level == "wrong"]


@pytest.mark.parametrize("model", ["v32-fp8", "glm5-bf16", "glm52-fp8"])
def test_whole_checkpoints_are_right(model: str) -> None:
    report = check_folder(make_checkpoint(model))
    assert report.findings == ()
    stored = report.facts["weights"]
    assert ("indexer.wk F8_E4M3" in stored) == model.endswith("fp8")


def released(dsa: DSAConfig, *, fp8: bool) -> dict[str, Header]:
    """Headers as a release of the registry's sizes has them."""
    tensors: dict[str, Header] = {}
    for layer in range(dsa.num_hidden_layers + dsa.num_nextn_predict_layers):
        for name, shape in attention_shapes(dsa, layer).items():
            full = f"model.layers.{layer}.self_attn.{name}"
            quantised = fp8 and len(shape) == 2 and "weights_proj" not in name
            tensors[full] = {"dtype": "F8_E4M3" if quantised else "BF16", "shape": shape}
            if quantised:
                scale = [-(-size // 128) for size in shape]
                tensors[f"{full}_scale_inv"] = {"dtype": "F32", "shape": scale}
    return tensors


FAMILIES = [entry.model_type for entry in all_entries()]
OTHER_THETA = {"rope_theta": 5e5, "rope_type": "default"}
LESS_SHARING = {"indexer_types": None, "index_topk_freq": 2, "index_topk_pattern": None}


@pytest.mark.parametrize(
    ("model_type", "changes", "told"),
    [
        *((family, {}, None) for family in FAMILIES),
        *((family, {"index_topk": 4096}, "index_topk: is 4096") for family in FAMILIES),
        *((family, LESS_SHARING, "the sharing pattern: is F") for family in FAMILIES),
        ("deepseek_v32", {"rope_scaling": None}, "rope_scaling's factor: is None"),
        ("glm_moe_dsa", {"rope_parameters": OTHER_THETA}, "rope_theta: is 500000.0"),
    ],
)
def test_a_config_is_compared_with_the_release_of_its_size(
    tmp_path: Path, model_type: str, changes: dict[str, Any], told: str | None
) -> None:
    write_config(tmp_path / "released", model_type, "fp8")
    config = load_config(tmp_path / "released")
    headers = Headers(released(DSAConfig.from_hf(config), fp8=True), {})
    found = wrong(check_files("released", config | changes, headers, None))
    assert [bool(found)] == [told is not None]
    if told:
        assert any(text.startswith(told) for text in found), found


def drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[INDEXER + name]

    return change


def packed(tensors: Tensors) -> None:
    del tensors[INDEXER + "weights_proj.weight"]
    tensors[INDEXER + "weights_proj.weight_packed"] = torch.zeros(16, 32, dtype=torch.int32)
    tensors[INDEXER + "weights_proj.weight_scale"] = torch.ones(16, 2).bfloat16()


def packed_in_place(tensors: Tensors) -> None:
    tensors[INDEXER + "wk.weight"] = torch.zeros(128, 32, dtype=torch.int32)


def fused(tensors: Tensors) -> None:
    parts = [tensors.pop(f"{INDEXER}{name}.weight") for name in ("wk", "weights_proj")]
    tensors[INDEXER + "wk_weights_proj.weight"] = torch.cat([part.float() for part in parts])


def misshapen(tensors: Tensors) -> None:
    tensors[INDEXER + "wq_b.weight"] = tensors[INDEXER + "wq_b.weight"][:-128].contiguous()


def fp8_weights_proj(tensors: Tensors) -> None:
    name = INDEXER + "weights_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = torch.ones(1, 2)


def misshapen_scale(tensors: Tensors) -> None:
    tensors[INDEXER + "wk.weight_scale_inv"] = torch.full((7, 7), 0.5)


def unindexed(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".indexer." in name and ".layers.2." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        (drop("wk.weight"), {}, "{1}.self_attn.indexer.wk.weight: is missing; expected shape"),
        (drop("k_norm.bias"), {}, "{1}.self_attn.indexer.k_norm.bias: is missing"),
        (packed, {}, "indexer.weights_proj: is packed (weight_packed, I32 [16, 32])"),
        (packed_in_place, {}, "indexer.wk: is packed (weight, I32 [128, 32])"),
        (fused, {}, "holds wk and weights_proj in one tensor [144, 256]"),
        (misshapen, {}, "wq_b.weight: has shape [1920, 128]; config.json asks for [2048, 128]"),
        (fp8_weights_proj, {}, "weights_proj.weight: is fp8; vLLM reads it unquantised"),
        (drop("wk.weight_scale_inv"), {}, "wk.weight: is fp8 [128, 256] without a scale"),
        (misshapen_scale, {}, "wk.weight_scale_inv: has shape [7, 7]"),
        (unindexed, {}, "sharing is missing: it asks for indexers in 4 layers, and 3"),
        (untouched, {"quantization_config": None}, "config.json has no quantization_config"),
        (untouched, {"indexer_rope_interleave": True}, "says interleaved; every deepseek_v32"),
        (untouched, {"rope_theta": None}, "rope_theta: is in config.json nowhere"),
        (
            untouched,
            {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 9}},
            "rope_scaling: lacks mscale_all_dim",
        ),
    ],
)
def test_what_headers_show(
    tmp_path: Path, change: Callable[[Tensors], None], config: dict[str, Any], told: str
) -> None:
    found = wrong(check_folder(changed(make_checkpoint("v32-fp8"), tmp_path, change, **config)))
    assert any(told in text for text in found), found


def test_a_lost_sharing_pattern_is_told_by_the_tensors(tmp_path: Path) -> None:
    folder = changed(
        make_checkpoint("glm52-bf16"),
        tmp_path,
        untouched,
        indexer_types=None,
        index_topk_freq=None,
        index_skip_topk_offset=None,
    )
    [found] = [text for text in wrong(check_folder(folder)) if "sharing is missing" in text]
    assert found.endswith('say "index_topk_pattern": "FFFSSF"')


def test_shards_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    source = make_checkpoint("v32-bf16")
    tensors = load_file(source / "model.safetensors")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{n}.safetensors": names[n::3] for n in range(3)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    index = {name: file for file, part in shards.items() for name in part}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert check_folder(copy).findings == ()
    (copy / "model-1.safetensors").unlink()
    path = copy / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = wrong(check_folder(copy))
    assert any("model-1.safetensors: is named in" in text for text in found)
    assert any("model-2.safetensors" in text and "truncated" in text for text in found)


def nan(tensors: Tensors) -> None:
    tensors[INDEXER + "wk.weight"][3, 5] = torch.nan


def zero(tensors: Tensors) -> None:
    tensors[INDEXER + "weights_proj.weight"].zero_()


@pytest.mark.parametrize(
    ("model", "change", "told"),
    [
        ("v32-bf16", nan, "indexer.wk.weight: holds 1 NaN or infinite values"),
        ("v32-bf16", zero, "weights_proj.weight: is zero everywhere"),
        ("v32-fp8", "ones", "wk.weight_scale_inv: is 1 everywhere"),
        ("v32-fp8", "raw", "they are fp8 values whose scale was dropped"),
        ("v32-fp8", "negative", "holds 2 scales that are not positive"),
    ],
)
def test_what_values_show(tmp_path: Path, model: str, change: Any, told: str) -> None:
    def rescale(tensors: Tensors) -> None:
        scale = tensors[INDEXER + "wk.weight_scale_inv"]
        if change == "raw":
            raw = tensors[INDEXER + "wk.weight"].float().bfloat16()
            tensors[INDEXER + "wk.weight"] = raw
            del tensors[INDEXER + "wk.weight_scale_inv"]
        elif change == "ones":
            scale.fill_(1)
        else:
            scale.neg_()

    made = rescale if isinstance(change, str) else change
    report = verify(changed(make_checkpoint(model), tmp_path, made), [1], [70])
    assert any(told in text for text in wrong(report)), wrong(report)
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("change", [nan, zero])
def test_weights_without_a_style_are_not_of_the_other(
    tmp_path: Path, change: Callable[[Tensors], None]
) -> None:
    report = verify(changed(make_checkpoint("v32-bf16"), tmp_path, change), [1], [130])
    assert any("the weights do not tell" in str(finding) for finding in report.findings)
    # NaN on both sides is not agreement.
    assert all("index keys" in cell.wrong for cell in report.cells) == (change is nan)


def test_a_wrong_style_is_told_from_trained_weights_alone(tmp_path: Path) -> None:
    """The registry or config.json may be wrong; random weights do not tell."""
    right = verify(DEMO, [1], [200])
    assert any("were trained with this RoPE style" in str(f) for f in right.findings)
    copy = changed(DEMO, tmp_path, untouched, indexer_rope_interleave=True)
    found = wrong(verify(copy, [1], [200]))
    told = "config.json means interleaved, the weights were trained half-split"
    assert any(told in text for text in found)
    untold = verify(make_checkpoint("v32-bf16"), [1], [200])
    assert any("the weights do not tell" in str(f) for f in untold.findings)
    assert not untold.wrong


def test_layers_that_cannot_be_read_are_not_run(tmp_path: Path) -> None:
    copy = changed(make_checkpoint("v32-bf16"), tmp_path, packed_in_place)
    report = verify(copy, [1, 2], [65])
    assert {cell.layer for cell in report.cells} == {2}
    assert Finding("note", "layers 1", "are not run: see what is said of their tensors") in (
        report.findings
    )


def test_layers_in_words() -> None:
    assert layers_text([5, 0, 1, 2, 7, 6]) == "0-2,5-7"
    assert layers_text([4]) == "4"
