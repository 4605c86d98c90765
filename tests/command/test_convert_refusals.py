"""`dsa convert`: what it refuses, by name, and what `--check` finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsa_plugin.convert.compare import compare
from dsa_plugin.convert.plan import plan
from dsa_plugin.convert.run import convert
from dsa_testbed.conversion import dsa_convert
from dsa_testbed.shards import INDEX, write_tiny

FIRST = "model-00001-of-000002.safetensors"
SECOND = "model-00002-of-000002.safetensors"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_tiny(tmp_path_factory.mktemp("tiny") / "source", 2)


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "source"))


def run(source: Path, target: Path, precision: Any = "w4a16") -> None:
    convert(plan(source, target, precision), 1, lambda _: None)


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])


def unpromised(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = FIRST
    (folder / INDEX).write_text(json.dumps(index))


def elsewhere(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../secrets.safetensors"}}))


def pickled(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def without_index(folder: Path, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    (folder / INDEX).unlink()
    edit(folder / file, change)


def set_to(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def dropping(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


_SCALE_OF_FIRST = f"{O_PROJ}_scale_inv"  # lies in the second file
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"model-00002-of-000002.safetensors holds .*truncated"),
    "no header": (
        lambda f: (f / FIRST).write_bytes(b"\x08" + b"\0" * 7 + b"not json"),
        "has a damaged header",
    ),
    "missing file": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    "missing tensor": (unpromised, r"promises model.norm.weight in model-00001"),
    "damaged index": (lambda f: (f / INDEX).write_text("{"), "index.json is damaged"),
    "index that leads out": (elsewhere, "names no files of this folder"),
    "pickled": (pickled, "pytorch_model.bin is pickled, and nothing is unpickled"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "AWQ": (
        lambda f: configure(f, quantization_config={"quant_method": "awq", "bits": 4}),
        "quantised already, by awq",
    ),
    "GPTQ": (
        lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised already, by gptq",
    ),
    "compressed-tensors": (
        lambda f: configure(f, quantization_config={"quant_method": "compressed-tensors"}),
        "quantised already, by compressed-tensors",
    ),
    "other blocks": (
        lambda f: configure(
            f, quantization_config={"quant_method": "fp8", "weight_block_size": [1, 128]}
        ),
        r"weight_block_size \[1, 128\]",
    ),
    "packed, unsaid": (
        lambda f: without_index(f, FIRST, set_to("a.qweight", torch.ones(8, 8).int())),
        r"a.qweight .* is I32 \[8, 8\]: packed",
    ),
    "no scale": (
        lambda f: without_index(f, SECOND, dropping(_SCALE_OF_FIRST)),
        rf"{O_PROJ} \(FP8 .* has no {O_PROJ}_scale_inv in any file",
    ),
    "no weight": (
        lambda f: without_index(f, FIRST, dropping(O_PROJ)),
        rf"{_SCALE_OF_FIRST} .* has no weight",
    ),
    "scale of no FP8": (
        lambda f: edit(f / FIRST, set_to(O_PROJ, torch.zeros(384, 256).bfloat16())),
        rf"{_SCALE_OF_FIRST} .* has a weight in BF16, not FP8",
    ),
    "scale of another shape": (
        lambda f: edit(f / SECOND, set_to(_SCALE_OF_FIRST, torch.ones(3, 3))),
        r"has scales F32 \[3, 3\]; expected \[3, 2\]",
    ),
    "twice": (
        lambda f: without_index(f, FIRST, set_to(_SCALE_OF_FIRST, torch.ones(3, 2))),
        "is in both",
    ),
    "unknown model": (lambda f: configure(f, model_type="llama"), "known of DSA models alone"),
    "unknown layer": (
        lambda f: without_index(f, FIRST, set_to("model.vision.weight", torch.ones(8, 128))),
        r"model.vision.weight \[8, 128\]: it is not known",
    ),
    "no whole groups": (
        lambda f: without_index(
            f, FIRST, set_to("model.layers.0.mlp.up_proj.weight", torch.ones(8, 192))
        ),
        "has 192 inputs, which is no multiple of 128",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_sources_refused(fault: str, source: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[fault]
    damage(source)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_targets_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the source or within it"):
        run(source, source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="is the source or within it"):
        run(source, tmp_path / "link" / "converted")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        run(source, tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds .*, and no conversion"):
        run(source, tmp_path)
    target = tmp_path / "target"
    run(source, target)
    with pytest.raises(ValueError, match="holds a conversion to w4a16, not bf16"):
        run(source, target, "bf16")
    (target / "config.json").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        list(compare(source, target, 1))
    configure(source, vocab_size=1)
    with pytest.raises(ValueError, match=r"of another checkpoint than .*config.json"):
        run(source, target)


def test_the_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    code, out = dsa_convert(capsys, monkeypatch, source, tmp_path / "target")
    assert (code, "give one of --to" in out) == (2, True)
    code, out = dsa_convert(capsys, monkeypatch, source, tmp_path / "target", "--to", "w8a16")
    assert (code, "2 files written, 0 kept" in out) == (0, True)
    code, out = dsa_convert(capsys, monkeypatch, source, tmp_path / "target", "--to", "w8a16")
    assert (code, "0 files written, 2 kept" in out) == (0, True)
    code, out = dsa_convert(capsys, monkeypatch, source, tmp_path / "target", "--check")
    assert (code, "8 tensors compared, 0 wrong; 0 files damaged" in out) == (0, True)
    assert "model.layers.*.self_attn.o_proj.weight x 2" in out
    code, out = dsa_convert(capsys, monkeypatch, source, tmp_path / "target", "--check", "--each")
    assert (code, out.count("o_proj.weight")) == (0, 2)


def flip(name: str, mask: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[9] ^= mask

    return change


def double(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name] * 2})


WQ_B = "model.layers.0.self_attn.indexer.wq_b.weight"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "one integer": ("w4a16", flip(f"{O_PROJ}_packed", 4), O_PROJ),
    "the next integer": ("w4a16", flip(f"{O_PROJ}_packed", 1), O_PROJ),
    "a scale": ("w8a16", flip(f"{O_PROJ}_scale", 8), O_PROJ),
    "doubled scales": ("w4a16", double(f"{O_PROJ}_scale"), O_PROJ),
    "a bit of bf16": ("bf16", flip(WQ_B, 16), WQ_B),
    "NaN": ("bf16", set_to(WQ_B, torch.full((384, 256), torch.nan).bfloat16()), WQ_B),
    "a router": ("w4a16", flip("model.layers.0.mlp.gate.weight", 1), "model.layers.0.mlp.gate"),
    "missing": ("w4a16", dropping(f"{O_PROJ}_packed"), O_PROJ),
    "another shape": ("bf16", set_to(WQ_B, torch.zeros(384, 128).bfloat16()), "shape"),
    "one too many": ("bf16", set_to("more.weight", torch.zeros(1)), "more.weight: not of the"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(
    fault: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    """Errors beyond the format's, and files that changed since, each by name."""
    precision, change, named = FAULTS[fault]
    target = tmp_path / "target"
    run(source, target, precision)
    (target / INDEX).unlink()
    edit(target / FIRST, change)
    code, out = dsa_convert(capsys, monkeypatch, source, target, "--check")
    assert code == 1
    assert any(line.startswith("FAIL ") and named in line for line in out.splitlines()), out
    assert f"FAIL {FIRST}: not as it was written" in out
    assert f"FAIL {INDEX}: not as it was written" in out
