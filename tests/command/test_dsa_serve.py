"""`dsa serve`: what it refuses, and the demo recipe of each host answering until Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
import yaml

from dsa_plugin.recipes import FOLDER, load_recipe
from dsa_plugin.recipes.launch import check_gpus
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.prompts import text_tokens
from dsa_testbed.server import Server, VllmServer
from dsa_testbed.sglang_server import SglangServer, sglang_python

DSA = ["-m", "dsa_plugin.cli"]


class DsaVllm(VllmServer):
    """`dsa serve demo/vllm-cpu --model MODEL -- ...`."""

    @classmethod
    def launcher(cls, model: str) -> list[str]:
        return [sys.executable, *DSA, "serve", "demo/vllm-cpu", "--model", model, "--"]


class DsaSglang(SglangServer):
    """`dsa serve demo/sglang-cpu --model MODEL -- ...`, of SGLang's environment."""

    @classmethod
    def launcher(cls, model: str) -> list[str]:
        python = str(sglang_python())
        return [python, *DSA, "serve", "demo/sglang-cpu", "--model", model, "--"]


@pytest.mark.serving
@pytest.mark.parametrize(
    "server_class",
    [DsaVllm, pytest.param(DsaSglang, marks=pytest.mark.matrix)],
    ids=lambda cls: cls.host,
)
def test_the_demo_answers_and_ctrl_c_leaves_nothing(server_class: type[Server]) -> None:
    mark = uuid.uuid4().hex
    model = make_checkpoint("v32")
    with server_class(model, env={"DSA_TEST_MARK": mark}) as server:
        assert len(server.complete(text_tokens(0, 300), 4, ignore_eos=True).tokens) == 4
        command = server.log_text().splitlines()[0]
        assert str(model) in command
        assert "--dtype float32" in command
        assert len(processes(mark)) > 1
        server.interrupt()
        for _ in range(100):
            if not processes(mark):
                break
            time.sleep(0.1)
        assert processes(mark) == []


def processes(mark: str) -> list[int]:
    """Those that were started with the mark in their environment."""
    needle = f"DSA_TEST_MARK={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes()
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if needle in environ:
            found.append(int(folder.name))
    return found


def dsa_serve(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *DSA, "serve", *args], capture_output=True, text=True, check=False
    )


def edited(tmp_path: Path, **change: object) -> str:
    recipe = yaml.safe_load((FOLDER / "demo" / "vllm-cpu.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe | change))
    return str(path)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def test_another_hosts_recipe_is_refused() -> None:
    message = refusal(dsa_serve("glm-5.2/sglang-h200-x8"))
    assert "this recipe is for sglang, which is not installed here; vllm 0." in message
    assert "or pip install 'sglang>=" in message
    assert "or `make sglang` in a clone" in refusal(dsa_serve("demo/sglang-cpu"))


def test_a_recipe_for_a_newer_host_is_refused(tmp_path: Path) -> None:
    message = refusal(dsa_serve(edited(tmp_path, host="vllm>=99")))
    assert "this recipe is for vllm>=99; installed is vllm 0." in message


@pytest.mark.parametrize("model", ["./no-such-folder", "/", "~/no-such-folder", "no-such", "a/b/c"])
def test_a_wrong_model_path_is_refused(model: str) -> None:
    message = refusal(dsa_serve("demo/vllm-cpu", "--model", model))
    assert model in message
    assert "does not exist" in message or "has no config.json" in message
    assert "with --model FOLDER" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_recipe_without_a_gpu_is_refused() -> None:
    message = refusal(dsa_serve("glm-5.2/vllm-h200-x8-tp8"))
    assert "this recipe is for 8 x h200 on each node, and torch 2." in message
    assert "finds no GPU here" in message


@pytest.mark.parametrize(
    ("count", "device", "note"),
    [
        (8, "NVIDIA H200", None),
        (4, "NVIDIA H200", "8 x h200 on each node; here are 4 x NVIDIA H200"),
        (8, "NVIDIA H100 80GB HBM3", "8 x h200 on each node; here are 8 x NVIDIA H100 80GB HBM3"),
    ],
)
def test_other_gpus_than_the_recipes_are_told(
    count: int, device: str, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    told = check_gpus(load_recipe("glm-5.2/vllm-h200-x8-tp8"))
    assert told == (note and f"this recipe is for {note}")


def test_a_node_has_a_rank_and_a_head() -> None:
    message = refusal(dsa_serve("glm-5.2/vllm-h200-2x8", "--node-rank", "0"))
    assert "--node-rank and --head go together" in message
    assert "run it on each" in refusal(dsa_serve("glm-5.2/vllm-h200-2x8"))


@pytest.mark.serving
def test_values_of_the_shell_win() -> None:
    # vLLM does not know the flag, so nothing is served.
    done = subprocess.run(
        [*DsaVllm.launcher(str(make_checkpoint("v32"))), "--no-such-flag"],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("VLLM_CPU_KVCACHE_SPACE=3 vllm serve ")
    assert done.stdout.splitlines()[0].endswith("--no-such-flag")
    assert done.returncode != 0
