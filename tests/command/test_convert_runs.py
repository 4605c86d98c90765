"""`dsa convert`: killed, resumed, in parallel, refused; always the same bytes, or an error."""

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_plugin.convert.manifest import MANIFEST
from dsa_plugin.convert.plan import plan
from dsa_plugin.convert.run import Done, convert
from dsa_testbed.conversion import hashes, kill_after
from dsa_testbed.shards import write_tiny

FILES = 6
FIRST = "model-00001-of-000006.safetensors"


def run(source: Path, target: Path, precision: Any = "w4a16", workers: int = 2) -> Done:
    return convert(plan(source, target, precision), workers, lambda _: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_tiny(tmp_path_factory.mktemp("tiny") / "source", FILES)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion by one worker in one go."""
    target = tmp_path_factory.mktemp("whole") / "target"
    run(source, target, workers=1)
    return target


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """A source that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "copied"))


def test_parallel_as_serial(source: Path, whole: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "target", workers=5)
    assert hashes(tmp_path / "target") == hashes(whole)


def test_the_manifest_has_the_hashes(source: Path, whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == hashes(whole)
    of_source = {name: file["sha256"] for name, file in manifest["source"].items()}
    assert of_source == {n: h for n, h in hashes(source).items() if n != "tokenizer.json"}
    last = "model-00006-of-000006.safetensors"
    assert manifest["made_from"][FIRST] == [FIRST, last]  # weights, and their scales


def test_killed_and_resumed(source: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for _ in range(3):
        assert kill_after(source, target, "w4a16", random.randrange(1, 9))
        assert not (target / "config.json").exists(), "a host would take it for a checkpoint"
    done = run(source, target)
    assert hashes(target) == hashes(whole)
    assert len(done.written) + len(done.kept) == FILES


def test_a_second_run_writes_nothing(source: Path, whole: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(whole, tmp_path / "target"))
    times = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert run(source, target).written == []
    assert times == {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}


def test_changed_and_missing_outputs_are_made_again(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(whole, tmp_path / "target"))
    names = sorted(path.name for path in target.glob("*.safetensors"))
    (target / names[0]).unlink()
    data = bytearray((target / names[1]).read_bytes())
    data[-1] ^= 1
    (target / names[1]).write_bytes(data)
    (target / names[2]).touch()
    assert sorted(run(source, target).written) == names[:2]
    assert hashes(target) == hashes(whole)


def test_failed_files_leave_the_others(copied: Path, tmp_path: Path) -> None:
    """A weight with NaN fails its file by name; the same command then goes on."""
    path = copied / FIRST
    tensors = load_file(path)
    good = path.read_bytes()
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name].view(torch.uint8)[5, 7] = 0x7F
    save_file(tensors, path, metadata={"format": "pt"})
    target = tmp_path / "target"
    with pytest.raises(ValueError, match=rf"{name} of .*{FIRST} holds an infinity or NaN"):
        run(copied, target, workers=1)
    assert not list(target.glob(".*"))
    path.write_bytes(good)
    with pytest.raises(ValueError, match=r"another checkpoint than .* is now .*model-00001"):
        run(copied, target)


def test_a_full_disk(source: Path, whole: Path, tmp_path: Path) -> None:
    """As a file that may not grow meets one; what is done stays, and the next run goes on."""
    target = tmp_path / "target"
    sizes = sorted(path.stat().st_size for path in whole.glob("*.safetensors"))
    command = [sys.executable, "-m", "dsa_plugin.cli", "convert", str(source), str(target)]
    limited = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(sizes[-1] - 1), *command, "--to", "w4a16"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert limited.returncode == 2
    [error] = [line for line in limited.stderr.splitlines() if line.startswith("Error")]
    assert f"{target} takes no more (File too large): " in error
    assert error.endswith("run the same command again, it goes on")
    assert not list(target.glob(".*"))
    assert not (target / "config.json").exists()
    run(source, target)
    assert hashes(target) == hashes(whole)


_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_room_is_looked_for_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=500_000))
    with pytest.raises(OSError, match=r"0.001 GB free of 0.00\d GB .* 6 of 6 files are missing"):
        run(source, tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.safetensors"))


def test_a_disk_that_fills_up_later(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", fails_at_call(7, OSError(errno.ENOSPC, "No space left")))
    target = tmp_path / "target"
    with pytest.raises(OSError, match=r"takes no more \(No space left\): \d of 6 files .* on"):
        run(source, target, workers=1)
    monkeypatch.undo()
    assert run(source, target).kept
    assert hashes(target) == hashes(whole)


def fails_at_call(number: int, error: OSError) -> Callable[[int], None]:
    calls: list[int] = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise error

    return fail


def test_one_at_a_time(source: Path, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)  # a shared lock, too, has to be waited for
    with pytest.raises(ValueError, match="another process converts into"):
        run(source, tmp_path)
    os.close(folder)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """What a conversion adds to the process is less than the tensor that it converts."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
    weight = torch.ones(16384, 8192, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.ones(128, 64)
    save_file(
        {"model.layers.0.mlp.up_proj.weight": weight,
         "model.layers.0.mlp.up_proj.weight_scale_inv": scale},
        source / "model.safetensors",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(source), str(tmp_path / "target")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < weight.nbytes * 3 // 4


_GROWTH = """
import resource, sys
from pathlib import Path
from dsa_plugin.convert.plan import plan
from dsa_plugin.convert.run import convert
import dsa_plugin.convert.shard
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert(plan(Path(sys.argv[1]), Path(sys.argv[2]), "w4a16"), 1, lambda count: None)
print(peak() - before)
"""
