"""How `dsa eval` starts a host, by stand-ins for vLLM that start, fail and hang."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsa_plugin.evaluation import hosts
from dsa_plugin.evaluation.completions import Patience
from dsa_plugin.evaluation.hosts import Deployment
from dsa_plugin.evaluation.variants import VARIANTS

FAILS = "import sys; print('error: no such flag'); sys.exit(3)"
FAILS_FAR_ABOVE = """
import sys
print("(Worker) ERROR ValueError: too little memory")
print("\\n".join(["  in a file"] * 30))
print("RuntimeError: see above")
sys.exit(3)
"""
HANGS = "import os, time; open('PID', 'w').write(str(os.getpid())); time.sleep(60)"
SERVES = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"data": [{"id": json.dumps(sys.argv[1:])}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_POST(self):
        print("the engine died", flush=True)
        os._exit(9)
    def log_message(self, *args): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
DEPLOYMENT = Deployment(
    host="vllm",
    checkpoint=Path("checkpoint"),
    dtype="float32",
    kv_cache_dtype="auto",
    index_topk=64,
    context=2048,
    flags=("--max-num-seqs", "4"),
)


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    program = folder / "vllm"
    program.write_text(f"#!/usr/bin/env python3\n{code}")
    program.chmod(0o755)
    monkeypatch.setattr(hosts, "_beside_interpreter", lambda _name: str(program))


def test_vllms_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_beside_interpreter", lambda name: f"/bin/{name}")
    dsa = DEPLOYMENT.command(VARIANTS["dsa"], 7)
    assert dsa == [
        *("/bin/vllm", "serve", "checkpoint", "--host", "127.0.0.1", "--port", "7"),
        *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "4"),
    ]
    half = DEPLOYMENT.command(VARIANTS["topk_half"], 7)
    assert half[-4:-2] == ["--hf-overrides", '{"index_topk": 32}']
    dense = DEPLOYMENT.command(VARIANTS["dense"], 7)
    assert '{"index_topk": 2048}' in dense
    fp8 = replace(DEPLOYMENT, kv_cache_dtype="fp8").command(VARIANTS["dsa"], 7)
    assert fp8[fp8.index("--kv-cache-dtype") + 1] == "fp8_ds_mla"


def test_sglangs_command_line() -> None:
    sglang = replace(DEPLOYMENT, host="sglang", kv_cache_dtype="fp8")
    command = sglang.command(VARIANTS["topk_quarter"], 7)
    assert command[1:5] == ["-m", "sglang.launch_server", "--model-path", "checkpoint"]
    pairs = dict(zip(command[5::2], command[6::2], strict=False))
    assert pairs["--context-length"] == "2048"
    assert pairs["--kv-cache-dtype"] == "fp8_e4m3"
    assert pairs["--json-model-override-args"] == '{"index_topk": 16}'


def test_what_no_flag_makes_is_refused() -> None:
    with pytest.raises(ValueError, match="window is in no flag of vllm: --through transformers"):
        DEPLOYMENT.command(VARIANTS["window"], 7)


def test_a_host_is_started_and_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, SERVES)
    with DEPLOYMENT.under(VARIANTS["dsa"], Patience()) as server:
        arguments = json.loads(server.model)
        assert hosts._is_ready(server.url)
    assert arguments[:2] == ["serve", "checkpoint"]
    assert not hosts._is_ready(server.url)


def test_a_host_that_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, tmp_path, FAILS)
    with (
        pytest.raises(ConnectionError, match=r"(?s)exit code 3 before it was ready.*no such flag"),
        DEPLOYMENT.under(VARIANTS["dsa"], Patience()),
    ):
        pass


def test_the_first_of_a_hosts_errors_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, tmp_path, FAILS_FAR_ABOVE)
    with (
        pytest.raises(ConnectionError) as failure,
        DEPLOYMENT.under(VARIANTS["dsa"], Patience()),
    ):
        pass
    first, second, *_ = str(failure.value).splitlines()
    assert "exit code 3" in first
    assert second == "(Worker) ERROR ValueError: too little memory"


def test_a_host_that_is_never_ready_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    stand_in(monkeypatch, tmp_path, HANGS.replace("PID", str(pid)))
    start = time.monotonic()
    with (
        pytest.raises(ConnectionError, match="it was not ready after 2 s"),
        replace(DEPLOYMENT, start_timeout=2).under(VARIANTS["dsa"], Patience()),
    ):
        pass
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_host_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dsa_plugin.evaluation.completions._PAUSE_SECONDS", 0.01)
    stand_in(monkeypatch, tmp_path, SERVES)
    with (
        pytest.raises(ConnectionError, match=r"(?s)vllm, serving dsa: .*cannot be.*engine died"),
        DEPLOYMENT.under(VARIANTS["dsa"], Patience()) as server,
    ):
        server.complete("text", ["?"], 4, "\n")
