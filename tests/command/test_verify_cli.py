"""`dsa verify` as a shell sees it, and on a repository, of which it asks for headers alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dsa_plugin import cli
from dsa_testbed.checkpoint import make_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"


def dsa_verify(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["dsa", "verify", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_layers_and_lengths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsa_verify(monkeypatch, DEMO, "--layers", "1", "--lengths", "65") == 0
    shown = capsys.readouterr().out
    assert "half-split (from the registry)" in shown
    assert "right: " in shown
    assert "2 comparisons with fp64" in shown
    code = dsa_verify(monkeypatch, DEMO, "--layers", "0-1", "--lengths", "65,70", "--json")
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["wrong"] is False
    places = {(cell["layer"], cell["length"], cell["caches"]) for cell in report["cells"]}
    assert places == {(n, t, c) for n in (0, 1) for t in (65, 70) for c in ("bfloat16", "fp8")}
    assert all(cell["keys"]["error"] <= cell["keys"]["allowed"] for cell in report["cells"])


def test_what_is_wrong_comes_first_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = without_a_key(tmp_path)
    assert dsa_verify(monkeypatch, copy, "--layers", "0", "--lengths", "65") == 1
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith(("WRONG", "note", "right"))]
    assert "indexer.wk.weight: is missing" in said[0]
    assert said[-1].startswith("WRONG: ")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "name a CHECKPOINT"),
        (["/nowhere"], "'/nowhere' is no folder and no repository"),
        (["deepseek-ai/DeepSeek-V3.2"], "is a repository, and only --quick reads those"),
        ([DEMO, "--layers", "9"], "layers [9] are asked for; this model has 0 to 2"),
        ([DEMO, "--layers", "a"], "--layers is 'a'; allowed: indices and ranges"),
        ([DEMO, "--lengths", "1M"], "--lengths is '1M'; allowed: tokens"),
        ([DEMO, "--lengths", "64K"], "this model takes 1 to 16,384 tokens"),
        ([DEMO, "--quick", "--layers", "0"], "--quick runs no layer"),
        ([DEMO.parent], "has no config.json"),
        ([DEMO, "--timeout", "5"], "--timeout: of a running server; name it with --url"),
        (["--url", "http://127.0.0.1:9", "--quick"], "--quick and --layers read a checkpoint's"),
        (["--url", "localhost"], "--url localhost; give it as http://HOST:PORT"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[object],
    told: str,
) -> None:
    assert dsa_verify(monkeypatch, *args) == 2
    assert told in capsys.readouterr().err


def without_a_key(folder: Path) -> Path:
    """A checkpoint that lacks a tensor."""
    copy = folder / "model"
    copy.mkdir()
    tensors = load_file(DEMO / "model.safetensors")
    del tensors["model.layers.1.self_attn.indexer.wk.weight"]
    save_file(tensors, copy / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (copy / name).write_bytes((DEMO / name).read_bytes())
    return copy


class Hub:
    """Serves folders as repositories, whole or in ranges; `sent` counts bytes of weights."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.sent = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                owner, name, _, _, file = self.path.lstrip("/").split("?")[0].split("/", 4)
                path = hub.folders.get(f"{owner}/{name}", Path("/nowhere")) / file
                if not path.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content, wanted = path.read_bytes(), self.headers.get("range")
                if wanted:
                    first, last = wanted.removeprefix("bytes=").split("-")
                    content = content[int(first) : int(last) + 1]
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{file}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if body:
                    hub.sent += len(content) if file.endswith(".safetensors") else 0
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    found = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + template)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_a_repository_is_read_by_its_headers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: Hub, tmp_path: Path
) -> None:
    """The right one passes, one that lacks a tensor does not, and no weights are downloaded."""
    hub.folders["org/right"] = make_checkpoint("v32-bf16")
    hub.folders["org/wrong"] = without_a_key(tmp_path)
    assert dsa_verify(monkeypatch, "org/right", "--quick") == 0
    assert "right: org/right (headers alone)" in capsys.readouterr().out
    assert dsa_verify(monkeypatch, "hf://org/wrong", "--quick") == 1
    assert "indexer.wk.weight: is missing" in capsys.readouterr().out
    sizes = [(folder / "model.safetensors").stat().st_size for folder in hub.folders.values()]
    assert 0 < hub.sent < sum(sizes) / 10


def test_shards_of_a_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: Hub, tmp_path: Path
) -> None:
    tensors = load_file(DEMO / "model.safetensors")
    names = sorted(tensors)
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    files = {name: f"model-{place % 2}.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    hub.folders["org/sharded"] = folder
    assert dsa_verify(monkeypatch, "org/sharded", "--quick") == 0
    (folder / "model-1.safetensors").unlink()
    assert dsa_verify(monkeypatch, "org/sharded", "--quick") == 1
    assert "model-1.safetensors: is named in" in capsys.readouterr().out
    (folder / "model-1.safetensors").write_bytes(b"<html>" + bytes(100))
    assert dsa_verify(monkeypatch, "org/sharded", "--quick") == 1
    assert "model-1.safetensors: has no readable header" in capsys.readouterr().out


def test_a_repository_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: Hub, tmp_path: Path
) -> None:
    assert dsa_verify(monkeypatch, "org/none", "--quick") == 2
    assert "config.json of org/none could not be had" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    (empty / "pytorch_model.bin").write_bytes(bytes(8))
    hub.folders["org/pickled"] = empty
    assert dsa_verify(monkeypatch, "org/pickled", "--quick") == 2
    assert "has neither model.safetensors.index.json nor" in capsys.readouterr().err
