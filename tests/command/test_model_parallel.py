"""`dsa convert --model-parallel`: each rank's file, by what `dsa generate` makes of it."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_plugin.config import DSAConfig
from dsa_plugin.convert.model_parallel import plan_ranks
from dsa_plugin.convert.plan import plan
from dsa_plugin.convert.rows import PIECE_BYTES, read_cut, rows_at_once
from dsa_plugin.convert.run import Done, convert
from dsa_plugin.convert.source import read_shard
from dsa_plugin.generate.generator import Generator, Limits
from dsa_plugin.generate.ranks import Ranks
from dsa_plugin.generate.sampling import Sampling
from dsa_plugin.generate.weights import load_model
from dsa_plugin.hosts.checkpoint import check_checkpoint
from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.conversion import dsa_convert, hashes, kill_after
from dsa_testbed.shards import write_shards
from dsa_testbed.small_models import small_model
from dsa_testbed.tokenizer import encode, shipped_text

CPU = torch.device("cpu")
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def run(source: Path, target: Path, size: int, workers: int = 2) -> Done:
    return convert(plan_ranks(source, target, size), workers, lambda _: None)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3.2 with an MTP layer, in FP8 and in three files; many a weight and its scale part."""
    return write_shards(small_model("v32-fp8"), tmp_path_factory.mktemp("fp8") / "source", 3)


@pytest.fixture(scope="module")
def cut(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For four ranks, whose shares begin within blocks of 128."""
    target = tmp_path_factory.mktemp("cut") / "target"
    run(fp8, target, 4, workers=1)
    return target


def tied(tmp_path: Path) -> Path:
    """A checkpoint whose head is its embedding, and stored nevertheless."""
    folder = Path(shutil.copytree(make_checkpoint("v32"), tmp_path / "tied"))
    config = load_config(folder) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "size"), [("fp8", 4), ("glm52", 2), ("tied", 2)])
def test_a_rank_loads_from_its_file_what_it_would_have_cut(
    name: str, size: int, fp8: Path, tmp_path: Path
) -> None:
    """That file alone, which holds nothing else."""
    source = {"fp8": lambda: fp8, "tied": lambda: tied(tmp_path)}.get(
        name, lambda: make_checkpoint(name)
    )()
    run(source, tmp_path / "target", size)
    for rank in range(size):
        alone, file = tmp_path / str(rank), f"model{rank}-mp{size}.safetensors"
        alone.mkdir()
        for needed in (file, "config.json"):
            shutil.copy(tmp_path / "target" / needed, alone / needed)
        ranks = Ranks(rank, size, CPU)
        expected, found = (
            load_model(folder, ranks, torch.float32).state_dict() for folder in (source, alone)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        stored = {key.removesuffix("_scale_inv") for key in load_file(alone / file)}
        assert stored == expected.keys() - ({"lm_head.weight"} if name == "tied" else set())


def test_two_ranks_give_the_tokens_of_the_checkpoint(tmp_path: Path) -> None:
    """By torchrun and gloo, from text, without the checkpoint."""
    source, target = make_checkpoint("glm52"), tmp_path / "target"
    run(source, target, 2)
    passages = [shipped_text()[1000 : 1000 + length] for length in (30, 700)]
    lines = "".join(json.dumps({"prompt": passage}) + "\n" for passage in passages)
    (tmp_path / "prompts.jsonl").write_text(lines)
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dsa_plugin.cli"]
    asked = ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12"]
    done = subprocess.run(
        [sys.executable, *ranks, "generate", str(target), *asked, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = load_model(source, Ranks(0, 1, CPU), torch.float32)
    tokens = [encode(passage, load_config(source)["vocab_size"]) for passage in passages]
    expected = Generator(whole, Sampling(), Limits(12)).generate(tokens)
    assert [json.loads(line)["tokens"] for line in done.stdout.splitlines()] == expected


def test_killed_and_resumed(fp8: Path, cut: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for _ in range(2):
        assert kill_after(fp8, target, "4", random.randrange(1, 300))
        assert not (target / "config.json").exists()
    done = run(fp8, target, 4)
    assert len(done.written) + len(done.kept) == 4
    assert hashes(target) == hashes(cut)
    manifest = json.loads((target / "dsa_convert.json").read_text())
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == hashes(cut)
    read = [name for name in hashes(fp8) if name.endswith(".safetensors")]
    assert manifest["made_from"]["model3-mp4.safetensors"] == sorted(read)
    assert all(manifest["source"][name]["sha256"] == hashes(fp8)[name] for name in read)


def test_what_lies_beside_is_copied(fp8: Path, cut: Path) -> None:
    ours = {f"model{rank}-mp4.safetensors" for rank in range(4)}
    theirs = {name for name in hashes(fp8) if "safetensors" not in name}
    assert hashes(cut).keys() == ours | theirs
    assert load_config(cut) == load_config(fp8)
    assert (cut / "tokenizer.json").read_bytes() == (fp8 / "tokenizer.json").read_bytes()


def test_pieces_are_bounded(tmp_path: Path) -> None:
    """Of a tensor's columns, and together all of them."""
    whole = torch.arange(4096 * 4096).to(torch.int32).view(4096, 4096).view(torch.float32)
    save_file({"a": whole}, tmp_path / "a.safetensors")
    stored = read_shard(tmp_path, "a.safetensors")["a"]
    where = (slice(0, 4096), slice(1024, 2048))
    pieces = list(read_cut(stored, where, rows_at_once(4096)))
    assert max(piece.untyped_storage().nbytes() for piece in pieces) <= PIECE_BYTES
    assert torch.equal(torch.cat(pieces).view(torch.int32), whole[where].view(torch.int32))


def test_folders_refused(fp8: Path, cut: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cut for 4 ranks, not 2: use --nproc-per-node 4, or the"):
        load_model(cut, Ranks(0, 2, CPU), torch.float32)
    with pytest.raises(ValueError, match="is cut for 4 ranks; take the checkpoint"):
        plan_ranks(cut, tmp_path / "target", 2)
    with pytest.raises(ValueError, match="is cut for 4 ranks; take the checkpoint"):
        plan(cut, tmp_path / "target", "bf16")
    with pytest.raises(ValueError, match="which no host reads; serve the checkpoint"):
        check_checkpoint(cut, DSAConfig.from_hf(load_config(cut)), unquantised={})
    with pytest.raises(ValueError, match="holds a conversion to mp4, not mp2; name another"):
        run(fp8, cut, 2)
    copy = Path(shutil.copytree(cut, tmp_path / "copy"))
    file = copy / "model1-mp4.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model1-mp4.safetensors holds .* truncated"):
        load_model(copy, Ranks(1, 4, CPU), torch.float32)
    file.unlink()
    with pytest.raises(ValueError, match=r"lacks model1-mp4.safetensors"):
        load_model(copy, Ranks(1, 4, CPU), torch.float32)
    file.with_name("model1-mp2.safetensors").touch()
    with pytest.raises(ValueError, match="weights cut for 2, 4 ranks"):
        load_model(copy, Ranks(0, 4, CPU), torch.float32)


def test_numbers_of_ranks_refused(fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 ranks do not divide num_.* = 4, .* works is 1, 2, 4$"):
        plan_ranks(fp8, tmp_path / "target", 3)


def test_the_command(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    target = tmp_path / "target"
    code, out = dsa_convert(capsys, monkeypatch, fp8, target, "--model-parallel", 2, "--to", "bf16")
    assert (code, "convert with --to bf16, then the new folder" in out) == (2, True)
    code, out = dsa_convert(capsys, monkeypatch, fp8, target, "--model-parallel", 2)
    assert (code, "mp2, 2 files written, 0 kept" in out) == (0, True)
    code, out = dsa_convert(capsys, monkeypatch, fp8, target, "--check")
    assert (code, " 0 wrong; 0 files damaged" in out) == (0, True)
    assert "model.layers.*.self_attn.o_proj.weight of rank * x 8" in out


def other_ranks(folder: Path, tensors: dict[str, Any]) -> None:
    tensors[O_PROJ] = load_file(folder / "model0-mp4.safetensors")[O_PROJ]


def one_more(_: Path, tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"] = torch.zeros(1)


FAULTS: dict[str, tuple[Callable[[Path, dict[str, Any]], Any], str]] = {
    "cut for rank 0": (other_ranks, f"{O_PROJ} of rank 1: same, inf"),
    "a scale": (
        lambda _, tensors: tensors[f"{O_PROJ}_scale_inv"].mul_(2),
        f"{O_PROJ}_scale_inv of rank 1: same, inf",
    ),
    "missing": (lambda _, tensors: tensors.pop(O_PROJ), f"{O_PROJ} of rank 1: missing"),
    "not cut": (
        lambda _, tensors: tensors.update({O_PROJ: tensors[O_PROJ].repeat(1, 4)}),
        f"{O_PROJ} of rank 1: shape [256, 512]",
    ),
    "another rank's expert": (one_more, "experts.0.up_proj.weight of rank 1: not of this rank"),
    "no file": (
        lambda folder, _: (folder / "model3-mp4.safetensors").unlink(),
        "model3-mp4.safetensors: missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(
    fault: str,
    fp8: Path,
    cut: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    change, named = FAULTS[fault]
    target = Path(shutil.copytree(cut, tmp_path / "target"))
    file = target / "model1-mp4.safetensors"
    tensors = load_file(file)
    change(target, tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    code, out = dsa_convert(capsys, monkeypatch, fp8, target, "--check", "--workers", 1)
    assert code == 1
    assert any(line.startswith("FAIL ") and named in line for line in out.splitlines()), out
