"""`dsa doctor --bundle`: what is in the file, what never is, and what goes wrong on the way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsa_kernels import sparse_mla, topk_select
from dsa_kernels.arch import ARCHS
from dsa_plugin import cli
from dsa_plugin.doctor import bundle, command_line, self_probe
from dsa_plugin.doctor.bundle import Asked, make_bundle
from dsa_plugin.doctor.checkpoint import config_numbers
from dsa_plugin.doctor.findings import Finding
from dsa_plugin.env import VARIABLES
from dsa_plugin.probe.ask import Answer
from dsa_testbed.checkpoint import make_checkpoint

SECRETS = [f"planted{number}Zx" for number in range(12)]
LOG = f"""\
(APIServer pid=1) INFO 11-28 07:00:00 [a.py:1] non-default args: {{'api_key': ['{SECRETS[0]}']}}
(APIServer pid=1) INFO 11-28 07:00:01 [a.py:2] Received request c-1: prompt: 'say {SECRETS[1]}
and {SECRETS[2]}', params: x
(EngineCore pid=2) ERROR 11-28 07:00:02 [b.py:3] GET https://u:{SECRETS[3]}@host.example/{SECRETS[4]}
(EngineCore pid=2) ERROR 11-28 07:00:02 [b.py:3] the token was {SECRETS[5]}
"""
COMMAND = [
    f"VLLM_API_KEY={SECRETS[6]}",
    *("vllm", "serve", "model-folder", "-tp", "2", "--api-key", SECRETS[7]),
    f"--ssl-keyfile-password={SECRETS[8]}",
    *("--kv-transfer-config", json.dumps({"kv_connector": "X", "auth_token": SECRETS[9]})),
    *("--enable-dbo", "--port", "80"),
]
ENVIRON = {
    "HF_TOKEN": SECRETS[5],
    "NCCL_DEBUG": "INFO",
    "VLLM_RPC_BASE_PATH": f"redis://:{SECRETS[10]}@cache.example:6379",
    "SOMETHING_ELSE": SECRETS[11],
    "DSA_LOGITS_WORKSPACE_MB": "64",
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host to ask, and no kernels to run."""
    monkeypatch.setattr(bundle, "installed_version", lambda _: None)
    monkeypatch.setattr(command_line, "installed_version", lambda _: None)
    monkeypatch.setattr(bundle, "kernels", lambda _: {"probe": []})


@pytest.mark.usefixtures("alone")
def test_no_secret_is_in_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    made = make_bundle(Asked(COMMAND, None, log), ENVIRON)
    text = json.dumps(made)
    assert [secret for secret in SECRETS if secret in text] == []
    assert "host.example" not in text
    assert "cache.example" not in text
    assert [line["name"] for line in made["environment"]] == [
        "NCCL_DEBUG",
        "VLLM_API_KEY",
        "VLLM_RPC_BASE_PATH",
    ]
    assert len(made["log"]) == 4


@pytest.mark.usefixtures("alone")
def test_without_a_host_a_gpu_or_a_model() -> None:
    made = make_bundle(Asked(COMMAND), ENVIRON)
    assert list(made) == [
        *("dsa_bundle", "made", "versions", "machine", "gpus", "findings", "settings"),
        *("environment", "kernels", "command"),
    ]
    assert made["gpus"] == []
    assert set(made["settings"]) == {variable.name for variable in VARIABLES}
    assert made["settings"]["DSA_LOGITS_WORKSPACE_MB"] == "64"
    assert made["settings"]["DSA_PLUGIN"] == "auto (default)"
    classes = {switch["name"]: switch["classed"] for switch in made["command"]["switches"]}
    assert classes == {
        "VLLM_API_KEY": "no_concern",
        "-tp": "unclassified",  # which flag that is, the host alone says
        "--api-key": "no_concern",
        "--ssl-keyfile-password": "unclassified",
        "--kv-transfer-config": "served",
        "--kv-transfer-config.kv_connector": "no_concern",
        "--kv-transfer-config.auth_token": "unclassified",
        "--enable-dbo": "refused",
        "--port": "no_concern",
    }
    assert made["command"]["finding"]["text"].startswith("vllm is not installed in ")


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_by_its_numbers(tmp_path: Path) -> None:
    folder = make_checkpoint("glm52")
    counts = tmp_path / "ops"
    for process, text in enumerate(("topk_select 3\n", "topk_select 4\nsparse_mla 1\n")):
        (tmp_path / f"ops.{process}").write_text(text)
    command = ["vllm", "serve", str(folder)]
    made = make_bundle(Asked(command), {"DSA_OP_COUNTS": str(counts)})
    assert made["op_counts"] == {"topk_select": 7, "sparse_mla": 1}
    model = made["model"]
    assert model["config"]["index_topk"] == 64
    assert model["decisions"]["sharing"] == "FFFSSF"
    assert model["decisions"]["indexer_rope"] == "interleaved"
    assert model["decisions"]["bytes_a_token_and_layer"]["latents"] == {"bf16": 1152, "fp8": 656}
    wk = "model.layers.*.self_attn.indexer.wk.weight"
    assert model["files"]["tensors"][wk] == {"F32 [128, 256]": 5}
    assert model["files"]["damaged"] == []


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"short")
    made = make_bundle(Asked((), str(tmp_path)), {"DSA_PLUGIN": "maybe"})
    assert made["settings"]["error"].startswith("DSA_PLUGIN='maybe'; allowed: auto, on, off")
    assert "not a whole safetensors file" in made["model"]["files"]["damaged"][0]
    assert made["model"]["decisions"]["error"].startswith("ValueError: ")
    (tmp_path / "config.json").unlink()
    made = make_bundle(Asked((), str(tmp_path)), {})
    assert made["model"]["error"].startswith("FileNotFoundError: ")


def test_words_of_a_config_that_are_names_stay_out() -> None:
    config = {"_name_or_path": "/x", "dtype": "bfloat16", "n": 1, "auto_map": {"a": "me.Model"}}
    assert config_numbers(config) == {"dtype": "bfloat16", "n": 1, "auto_map": {}}


@pytest.fixture
def dsa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(*args: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsa", "doctor", *args])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        said = capsys.readouterr()
        return exit_.value.code, said.out, said.err

    return run


@pytest.mark.usefixtures("alone")
def test_the_command(dsa: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    code, out, err = dsa("--bundle", str(file), "--", "vllm", "serve", "m", "--enable-dbo")
    assert (code, err) == (0, "")
    made = json.loads(file.read_text())
    assert out.startswith(f"{file}: {file.stat().st_size / 1024:.0f} KB of JSON: dsa_bundle, made,")
    assert made["dsa_bundle"] == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bundle", "/nowhere/x"], "Error: --bundle /nowhere/x cannot be written (No such file"),
        (["--bundle", "{folder}"], " cannot be written (Is a directory); name a file in a"),
        (["--bundle", "{folder}/x", "--gpu", "h200"], "Error: --gpu beside --bundle, which is of"),
        (["--bundle", "{folder}/x", "--log", "/no"], "Error: --log /no cannot be read (No such"),
        (["--log", "/no"], "Error: --log goes into a bundle; name its file with --bundle FILE"),
        (["--bundel", "{folder}/x"], "No such option: --bundel"),
        (["--bundle", "{folder}/x", "--", "vllm", "bench"], "`vllm bench` starts no server; allo"),
    ],
)
def test_errors(dsa: Callable[..., Any], tmp_path: Path, args: list[str], message: str) -> None:
    code, out, err = dsa(*(arg.format(folder=tmp_path) for arg in args))
    assert (code, out) == (2, "")
    assert message in err


def test_each_flag_with_its_class(dsa: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"-tp": "--tensor-parallel-size", "--tensor-parallel-size": "--tensor-parallel-size"}
    names |= {name: name for name in ("--enable-dbo", "--api-key", "--attention-config", "--port")}
    names["--no-enable-prefix-caching"] = "--enable-prefix-caching"
    answers = [Answer(None, {"spellings": names}), Answer("refused: 1. --enable-dbo: because")]
    monkeypatch.setattr(command_line, "ask", lambda *_: answers)
    monkeypatch.setattr(command_line, "installed_version", lambda _: "0.32.0")
    command = ["VLLM_BATCH_INVARIANT=0", "vllm", "serve", "m", "-tp", "2", "--enable-dbo"]
    command += ["--api-key", SECRETS[0], "--no-enable-prefix-caching", "--port=80"]
    command += ["--attention-config", '{"backend": "FLASHMLA", "made_up": 1}']
    code, out, _ = dsa("--", *command)
    assert code == 1
    first, *lines = out.splitlines()
    assert first == "FAIL command: refused: 1. --enable-dbo: because"
    exact = "tests/serving/test_exactness.py::test_tokens_equal_the_reference"
    expected = [
        "  served       VLLM_BATCH_INVARIANT 0: other values of it are refused, this one is not",
        f"  served       --tensor-parallel-size 2: {exact}",
        "  refused      --enable-dbo: the micro-batches of a step share one buffer of selected ",
        "  no concern   --api-key <redacted>: the API server, tokenizer and sampling",
        "  served       --enable-prefix-caching False: tests/",
        "  no concern   --port 80: the API server, tokenizer and sampling",
        '  no concern   --attention-config {"backend": "FLASHMLA", "made_up": 1}: tunes a kernel ',
        "  refused      --attention-config.backend FLASHMLA: the plugin's layers bring their own; ",
        "  unclassified --attention-config.made_up 1: not a switch of the releases that the ",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
    code, out, _ = dsa("--json", "--", *command)
    answer = json.loads(out)
    assert (code, answer["host"], answer["finding"]["ok"]) == (1, "vllm", False)
    assert SECRETS[0] not in out


def test_kernels_are_run_and_compared() -> None:
    """In a process of its own, with the device that is here."""
    found = self_probe.kernels(os.environ)
    ops = ["cache_write", "indexer_logits", "topk_select", "sparse_mla"]
    assert [answer["op"] for answer in found["probe"]] == ops
    assert all(answer["ok"] for answer in found["probe"]), found
    assert set(found["forms"]) == {"bf16", "fp8"}


def test_kernels_that_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    out = 'probe: {"op": "cache_write", "ok": true, "text": "x"}\n'
    done = subprocess.CompletedProcess([], -6, out, "CUDA error: an illegal address\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    last = self_probe.kernels({})["probe"][-1]
    assert last == {"op": "the next", "ok": False, "text": "CUDA error: an illegal address"}


def test_a_wrong_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: Any) -> Any:
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(topk_select, "topk_select", wrong)
    monkeypatch.setattr(sparse_mla, "sparse_mla", lambda q, *_: (2 * q[..., :512], q))
    monkeypatch.setattr(self_probe.Example, "indexer_logits", lambda _: 0.0)  # compiles for long
    self_probe.main()
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    answers = {found["op"]: found for found in map(json.loads, lines) if "op" in found}
    assert answers["topk_select"]["text"] == "ValueError: no such kernel"
    assert [op for op, found in answers.items() if not found["ok"]] == ["topk_select", "sparse_mla"]


@pytest.mark.parametrize("arch", ARCHS)
def test_tuning_says_where_each_configuration_came_from(arch: str) -> None:
    said = self_probe.tuning(ARCHS[arch])
    assert len(said) > 20
    assert all(text == "compiled" or " on " in text or " from " in text for text in said.values())
    assert said["topk_select select"] == "compiled"


def test_findings_are_those_of_the_installed_host(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Finding("vllm", False, "too old", "another")
    monkeypatch.setattr(bundle, "installed_version", lambda name: "1" if name == "vllm" else None)
    monkeypatch.setattr(bundle, "examine_environment", lambda _: [fault])
    assert bundle._findings()[0]["remedy"] == "another"
