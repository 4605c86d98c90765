"""What a bug report leaves out: secrets wherever they can stand, requests, and names."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin.doctor.log_tail import LINES, REQUEST, log_tail, without_requests
from dsa_plugin.doctor.redact import HOST, SECRET, USER, Redactor, is_secret

PLANTED = "planted-Zx81qW"
ENVIRON = {"SERVICE_PASSWORD": "hunter-of-two-9", "USER": "wilhelmina", "PATH": "/usr/bin"}


@pytest.fixture
def redactor(monkeypatch: pytest.MonkeyPatch) -> Redactor:
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/people/wilhelmina"))
    monkeypatch.setattr(socket, "gethostname", lambda: "ada-lovelace")
    return Redactor(ENVIRON)


@pytest.mark.parametrize(
    "name",
    [
        *("--api-key", "--admin-api-key", "HF_TOKEN", "hfToken", "api_key", "auth"),
        *(
            "AWS_SECRET_ACCESS_KEY",
            "S3_ACCESS_KEY_ID",
            "--ssl-keyfile-password",
            "--grpc.authToken",
        ),
    ],
)
def test_named_as_a_secret(redactor: Redactor, name: str) -> None:
    assert redactor.value(name, PLANTED) == SECRET
    # What was told once is known from then on.
    assert redactor.text(f"it was {PLANTED}.") == f"it was {SECRET}."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--max-num-batched-tokens", "8192"),
        ("--spec-tokens", "2"),
        ("--max-prefill-tokens", "16k"),
        ("--tokenizer", "org/name"),
        ("--tokenizer-mode", "auto"),
        ("--kv-cache-dtype", "fp8"),
        ("bos_token_id", "1"),
        ("num_speculative_tokens_per_batch_size", "[[1, 2], [8, 1]]"),
        ("--master-port", "29500"),
        ("--host", "127.0.0.1"),
        ("--dist-init-addr", "localhost:5000"),
        ("--hicache-host-memory-mode", "pinned"),
        ("--trust-remote-code", ""),
    ],
)
def test_a_setting_stays(redactor: Redactor, name: str, value: str) -> None:
    assert redactor.value(name, value) == value


@pytest.mark.parametrize(
    "text",
    [
        f"vllm serve m --api-key {PLANTED} --port 1",
        f"vllm serve m --api-key={PLANTED}",
        f"non-default args: {{'api_key': ['{PLANTED}'], 'port': 1}}",
        f'{{"token": "{PLANTED}"}}',
        f"HF_TOKEN={PLANTED} vllm serve m",
        f"Authorization: Bearer {PLANTED}",
        f"headers: {{'authorization': 'Basic {PLANTED}'}}",
        f"Cookie: session={PLANTED}; other={PLANTED}",
        f"https://someone:{PLANTED}@registry.example/v2",
        f"postgresql://u:{PLANTED}@db:5432/x",
        f"https://huggingface.co/m/resolve/main/x?token={PLANTED}",
        f"https://u:{PLANTED}@github.com/o/r",
        f"https://hooks.example/services/T/{PLANTED}",
        f"password: {PLANTED}",
        f"DB_PASSWORD='{PLANTED}'",
        "hf_abcdefghijklmnop",
        "sk-proj-abcdefghijkl",
        "ghp_abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\nabcdefghijklmnop\n-----END RSA PRIVATE KEY-----",
        "the password hunter-of-two-9 was wrong",
    ],
)
def test_a_secret_in_running_text(redactor: Redactor, text: str) -> None:
    left = redactor.text(text)
    for secret in (PLANTED, "abcdefghijkl", "ABCDEFGHIJ", "eyJ", "hunter"):
        assert secret not in left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/srv/people/wilhelmina/m/config.json", "~/m/config.json"),
        ("/home/grace/m", f"/home/{USER}/m"),
        ("C:\\Users\\grace\\m", f"C:\\Users\\{USER}\\m"),
        ("/data/wilhelmina/m", f"/data/{USER}/m"),
        ("ada-lovelace rank 0", f"{HOST} rank 0"),
        ("tcp://ada-lovelace:29500", f"tcp://{HOST}"),
        ("http://gpu-17.corp:80/v1", f"http://{HOST}"),
        ("ip-10-0-0-9.ec2.internal is up", f"{HOST} is up"),
        ("from 10.1.2.3:5000 and fe80::1", "from <address>:5000 and <address>"),
        ("ask grace@example.org", "ask <email>"),
    ],
)
def test_names_of_people_and_machines(redactor: Redactor, text: str, left: str) -> None:
    assert redactor.text(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "INFO 11-28 07:47:16 [core.py:1] GPU KV cache size: 1,024 tokens",
        "KeyError: 'model.layers.0.self_attn.indexer.wk.weight'",
        "unexpected keys: ['model.layers.4.eh_proj.weight']",
        "index keys: fp8; max_tokens=16, num_tokens: 3",
        "http://127.0.0.1:8000/health and https://github.com/vllm-project/vllm/issues/38006",
        "tests/serving/test_bf16.py::test_x sglang 0.5.23, torch 2.13.0",
        "threading.local and /models/DeepSeek-V3.2",
    ],
)
def test_what_a_report_needs_stays(redactor: Redactor, text: str) -> None:
    assert redactor.text(text) == text


def test_a_json_flag(redactor: Redactor) -> None:
    given = {"kv_connector": "X", "kv_ip": "node17", "extra": [{"access_key": PLANTED, "n": 1}]}
    left = json.loads(redactor.value("--kv-transfer-config", json.dumps(given)))
    assert left == {"kv_connector": "X", "kv_ip": HOST, "extra": [{"access_key": SECRET, "n": 1}]}
    assert redactor.text("connected to node17") == f"connected to {HOST}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("--chat-template", "{{ say me }}"), ("--system-prompt", "say me"), ("--any", "say\nme")],
)
def test_a_prompt_in_a_flag(redactor: Redactor, name: str, value: str) -> None:
    assert redactor.value(name, value) == f"<{len(value)} characters left out>"


@pytest.mark.parametrize(
    ("line", "left"),
    [
        (
            "INFO 1 Received request c-1: prompt: 'say me', params: x",
            "INFO 1 Received request c-1: ",
        ),
        ("[2026-11-28 07:47:16] Receive: obj=GenerateReqInput(text='say me')", None),
        ("ERROR 1 {'messages': [{'role': 'user', 'content': 'say me'}]}", None),
        ("INFO 1 input_ids=[1, 2, 3]", None),
    ],
)
def test_a_request_in_a_log(line: str, left: str | None) -> None:
    [first, last] = without_requests([line, "me again, in words", "INFO 2 next"])
    assert "me" not in first.replace(REQUEST, "").replace("messages", "")
    assert first.endswith(REQUEST)
    assert left is None or first == left + REQUEST
    assert last == "INFO 2 next"


def test_a_traceback_goes_on_behind_a_line_that_names_an_input() -> None:
    lines = ["Traceback (most recent call last):", "    f(input_ids=x)", "ValueError: too long"]
    assert without_requests(lines) == [lines[0], f"    f({REQUEST}", lines[2]]


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"INFO {n}\n" for n in range(3 * LINES)))
    lines = log_tail(log).splitlines()
    assert (len(lines), lines[-1]) == (LINES, f"INFO {3 * LINES - 1}")
    with pytest.raises(OSError, match=r"--log .*none cannot be read \(No such file"):
        log_tail(tmp_path / "none")


def test_a_count_is_no_secret() -> None:
    found: dict[str, Any] = {"tokens": "12", "key": "12", "api_key": "12"}
    assert [name for name, value in found.items() if is_secret(name, value)] == ["api_key"]
