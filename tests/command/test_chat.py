"""`dsa chat`: against a server that answers as told; and the prompt line on its own."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin import cli
from dsa_plugin.chat.address import server_url
from dsa_plugin.chat.server import Server
from dsa_plugin.cli import prompt_line

Json = dict[str, Any]


class Stub:
    """A server that streams `deltas`, or `chunks`, or answers with `status` and `body`."""

    def __init__(self) -> None:
        self.models: Any = {"data": [{"id": "parrot", "object": "model"}]}
        self.deltas: list[Json] = [{"content": "Hel"}, {"content": "lo."}]
        self.chunks: list[Json] = []
        self.status, self.body, self.cut = 200, "", False
        self.asked: list[Json] = []
        self.keys: list[str | None] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.keys.append(self.headers["Authorization"])
                self.reply(200, json.dumps(stub.models), "application/json")

            def do_POST(self) -> None:
                stub.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if stub.status != 200:
                    self.reply(stub.status, stub.body, "application/json")
                    return
                chunks = stub.chunks or [
                    {"choices": [{"index": 0, "delta": delta}]} for delta in stub.deltas
                ]
                lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
                text = "".join([*lines, "" if stub.cut else "data: [DONE]\n\n"])
                self.reply(200, text, "text/event-stream")

            def reply(self, status: int, text: str, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text.encode()) + 50 * stub.cut))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"127.0.0.1:{self.http.server_port}"


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    thread = threading.Thread(target=stub.http.serve_forever, args=(0.01,))
    thread.start()
    yield stub
    stub.http.shutdown()
    stub.http.server_close()
    thread.join()


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str | BaseException]:
    """What is typed, in order; an exception is a key such as Ctrl-C; after it, Ctrl-D."""
    lines: list[str | BaseException] = []

    def read(prompt: str) -> str:
        assert prompt == prompt_line.PROMPT
        line = lines.pop(0) if lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    return lines


def dsa_chat(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Exit code."""
    monkeypatch.setattr(sys, "argv", ["dsa", "chat", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_a_conversation(
    stub: Stub,
    typed: list[str | BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed += ["hello", "", "again", "/reset", "new", "/what", "/quit", "never asked"]
    flags = ["--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--thinking"]
    assert dsa_chat(monkeypatch, stub.address, *flags, "--api-key", "secret") in (0, None)
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"parrot at http://{stub.address}"
    assert out.count("Hello.") == 3
    assert "/what is no command" in out
    system = {"role": "system", "content": "Be brief."}
    said = {"role": "assistant", "content": "Hello."}
    questions = [{"role": "user", "content": text} for text in ("hello", "again", "new")]
    assert [asked["messages"] for asked in stub.asked] == [
        [system, questions[0]],
        [system, questions[0], said, questions[1]],
        [system, questions[2]],
    ]
    first = stub.asked[0]
    assert (first["model"], first["stream"], first["temperature"]) == ("parrot", True, 0)
    assert first["max_tokens"] == 9
    assert first["chat_template_kwargs"] == {"thinking": True, "enable_thinking": True}
    assert stub.keys == ["Bearer secret"]


def test_nothing_is_asked_for_that_was_not_given(stub: Stub) -> None:
    list(Server(server_url(stub.address), None, None).answer([{"role": "user", "content": "x"}]))
    assert set(stub.asked[0]) == {"model", "messages", "stream"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_dimmed_and_kept(
    stub: Stub,
    typed: list[str | BaseException],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub.deltas = [{name: "Let me "}, {name: "think."}, {"content": "\n\n42."}]
    typed += ["why?", "really?"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    dsa_chat(monkeypatch, stub.address)
    assert "\x1b[2mLet me \x1b[0m\x1b[2mthink.\x1b[0m\n\n42.\n" in capsys.readouterr().out
    answer = {"role": "assistant", "content": "42.", "reasoning_content": "Let me think."}
    assert stub.asked[1]["messages"][1] == answer


def test_ctrl_c_stops_an_answer_and_keeps_its_beginning(
    typed: list[str | BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[Json]] = []
    closed: list[bool] = []

    def answer(messages: list[Json]) -> Iterator[Any]:
        asked.append(messages)
        try:
            yield "answer", "It is"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    typed += [KeyboardInterrupt(), "a", "b"]
    prompt_line.converse(answer, None)
    assert closed == [True, True]
    assert asked[1][1] == {"role": "assistant", "content": "It is"}
    assert capsys.readouterr().out.count("It is [stopped]") == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "refused the request with 400: sorry"),
        (404, "refused the request with 404"),
        (429, "refused the request with 429"),
        (500, "failed with 500"),
    ],
)
def test_an_error_costs_its_question_alone(
    stub: Stub,
    typed: list[str | BaseException],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub.status, stub.body = status, "sorry"
    typed += ["hello", "again"]
    assert dsa_chat(monkeypatch, stub.address) in (0, None)
    assert capsys.readouterr().err.count(said) == 2
    assert len(stub.asked[1]["messages"]) == 1


def test_an_answer_that_breaks_off(stub: Stub) -> None:
    server = Server(server_url(stub.address), None, None)
    stub.cut = True
    with pytest.raises(ConnectionError, match=r"gives no answer \(peer closed"):
        list(server.answer([{"role": "user", "content": "x"}]))


def test_an_error_within_an_answer(stub: Stub) -> None:
    """As hosts report what fails after the answer has begun."""
    server = Server(server_url(stub.address), None, None)
    stub.chunks = [{"error": {"message": "out of pages", "code": 500}}]
    with pytest.raises(ConnectionError, match="failed within its answer: out of pages"):
        list(server.answer([{"role": "user", "content": "x"}]))


@pytest.mark.parametrize(
    ("models", "flags", "said"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, [], "has 2 models; give one with --model: a, b"),
        ({"data": [{"id": "a"}]}, ["--model", "b"], "has no model 'b'; give one with --model: a"),
        ({"data": []}, [], "has 0 models"),
        ({"error": "x"}, [], "lists no models"),
        ("<html>", [], "lists no models"),
    ],
)
def test_a_model_that_is_not_there(
    stub: Stub,
    models: Any,
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub.models = models
    assert dsa_chat(monkeypatch, stub.address, *flags) == 2
    assert said in capsys.readouterr().err


def test_no_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsa_chat(monkeypatch, "http://127.0.0.1:9/v1") == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: http://127.0.0.1:9 gives no answer (")
    assert "is the server up? `dsa serve RECIPE` starts one" in error


def test_addresses(tmp_path: Path) -> None:
    assert server_url("https://host.org/v1/") == "https://host.org"
    assert server_url("localhost:81") == "http://localhost:81"
    assert server_url("demo/vllm-cpu") == "http://127.0.0.1:8000"
    assert server_url("demo/sglang-cpu") == "http://127.0.0.1:30000"
    recipe = Path(cli.__file__).parents[2] / "recipes" / "demo" / "vllm-cpu.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(recipe.read_text().replace("args:", "args:\n  host: 0.0.0.0\n  port: 1234"))
    assert server_url(str(mine)) == "http://127.0.0.1:1234"
    with pytest.raises(ValueError, match="allowed are http"):
        server_url("ftp://host")
    with pytest.raises(ValueError, match="did you mean demo/vllm-cpu"):
        server_url("demo/vllm-cp")
