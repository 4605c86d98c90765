"""`dsa eval --url`: what it asks of a server, and what it says and keeps where one fails."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsa_plugin import cli
from dsa_plugin.evaluation import completions
from dsa_plugin.evaluation.exams import papers
from dsa_plugin.evaluation.results import Results
from dsa_testbed.failing_replies import drop, late, status

LENGTHS, KINDS, QUESTIONS = (512, 768), ("single", "count"), 2
LOGPROB = -2.0
Json = dict[str, Any]


class Stub:
    """A server that knows every answer, until it is told to fail.

    fail: what it does in place of answering the request of that number, counted from 0.
    """

    def __init__(self) -> None:
        self.fail: Callable[[BaseHTTPRequestHandler, int], bool] = lambda _handler, _number: False
        self.asked: list[Json] = []
        self.models = ["exam-taker"]
        self.echoes = True
        self.answers = {
            paper.exam.text + question.ask: question.answer
            for paper in papers(0, LENGTHS, KINDS, QUESTIONS)
            for question in paper.exam.questions
        }
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({"data": [{"id": name} for name in stub.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(body)
                if not stub.fail(self, len(stub.asked) - 1):
                    self.reply(stub.answer(body))

            def reply(self, content: Any, status: int = 200) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body: Json) -> Json:
        if not body.get("echo"):
            return {"choices": [{"text": self.answers[body["prompt"]]}]}
        words = body["prompt"].split()
        found = {"token_logprobs": [None, *[LOGPROB] * (len(words) - 1), -9.0]}
        choice = {"text": body["prompt"], "logprobs": found if self.echoes else None}
        return {"choices": [choice], "usage": {"prompt_tokens": len(words)}}


class Output(NamedTuple):
    code: object
    out: str
    err: str


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
def evaluate(
    stub: Stub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Output]:
    """Runs `dsa eval --url` on the stub, into results.json of the test's folder."""

    def run(*args: str) -> Output:
        asked = ["--lengths", ",".join(map(str, LENGTHS)), "--kinds", ",".join(KINDS)]
        asked += ["--questions", str(QUESTIONS), "--out", str(tmp_path / "results.json")]
        monkeypatch.setattr(sys, "argv", ["dsa", "eval", "--url", stub.url, *asked, *args])
        monkeypatch.setattr(completions, "_PAUSE_SECONDS", 0.01)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Output(exit_.value.code, captured.out, captured.err)

    return run


def test_right_answers_are_counted_and_kept(
    stub: Stub, evaluate: Callable[..., Output], tmp_path: Path
) -> None:
    done = evaluate("--plot", str(tmp_path / "heat.png"), "--min-recall", "100")
    assert done.code == 0, done.err
    assert "100.0" in done.out
    results = Results.load(tmp_path / "results.json")
    assert [(cell.variant, cell.length) for cell in results.cells] == [
        ("dsa", length) for length in LENGTHS
    ]
    for cell in results.cells:
        assert [answer.kind for answer in cell.answers] == ["single", "single", "count", "count"]
        assert all(answer.right for answer in cell.answers)
        # Neither the first token nor the one that was generated.
        assert cell.nll == -LOGPROB * cell.nll_tokens
    assert (tmp_path / "heat.png").stat().st_size > 1000
    questions = [body for body in stub.asked if not body.get("echo")]
    assert len(questions) == 8
    assert all(body["temperature"] == 0 and body["stop"] == ["\n"] for body in questions)
    assert {body["model"] for body in stub.asked} == {"exam-taker"}


def test_a_wrong_answer_fails_the_gate(stub: Stub, evaluate: Callable[..., Output]) -> None:
    key = next(iter(stub.answers))
    stub.answers[key] = " Nobody knows."
    done = evaluate("--min-recall", "100")
    assert done.code == 1
    assert "FAIL single at 512: dsa recalls 50.0 of 100, under 100" in done.out


def test_the_same_answers_are_asked_for(
    stub: Stub, evaluate: Callable[..., Output], tmp_path: Path
) -> None:
    assert evaluate().code == 0
    (tmp_path / "results.json").rename(tmp_path / "reference.json")
    assert evaluate("--same-as", str(tmp_path / "reference.json")).code == 0
    (tmp_path / "results.json").unlink()
    stub.answers[next(iter(stub.answers))] += " Or so."
    done = evaluate("--same-as", str(tmp_path / "reference.json"))
    assert done.code == 1
    assert "FAIL dsa at 512, text 0: 1 of 4 answers differ" in done.out


def _nonsense(handler: Any, _number: int) -> bool:
    handler.reply(b"<html>a proxy's page</html>")
    return True


def _empty(handler: Any, _number: int) -> bool:
    handler.reply({"object": "error"})
    return True


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (drop, "cannot be asked (RemoteProtocolError"),
        (status(500), "failed with 500: CUDA error: out of luck; tried 3 times"),
        (status(400), "refused the request with 400: CUDA error"),
        (late(2), "did not answer within 0.3 s; give it longer with --timeout"),
        (_nonsense, "answered what is not JSON: <html>"),
        (_empty, "answered without choices"),
    ],
)
def test_a_failure_is_told_and_nothing_is_lost(
    fail: Callable[[Any, int], bool],
    message: str,
    stub: Stub,
    evaluate: Callable[..., Output],
    tmp_path: Path,
) -> None:
    # The first text's four questions and its prose are answered.
    stub.fail = lambda handler, number: number >= 5 and fail(handler, number)
    start = time.monotonic()
    done = evaluate("--timeout", "0.3", "--num-concurrent", "1")
    assert time.monotonic() - start < 10
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) < 6
    assert [cell.length for cell in Results.load(tmp_path / "results.json").cells] == [512]
    stub.fail = lambda _handler, _number: False
    asked = len(stub.asked)
    assert evaluate("--resume").code == 0
    assert len(stub.asked) - asked == 5
    assert [cell.length for cell in Results.load(tmp_path / "results.json").cells] == [512, 768]


def test_one_failure_is_no_failure(stub: Stub, evaluate: Callable[..., Output]) -> None:
    stub.fail = lambda handler, number: number == 2 and drop(handler, number)
    assert evaluate().code == 0


def test_results_are_not_overwritten(evaluate: Callable[..., Output]) -> None:
    assert evaluate().code == 0
    done = evaluate()
    assert done.code == 2
    assert "is there already; --resume goes on with it" in done.err
    done = evaluate("--resume", "--max-gen-toks", "9")
    assert done.code == 2
    assert "the results are of max_gen_toks 48, not 9" in done.err


def test_a_model_is_named_where_there_are_several(
    stub: Stub, evaluate: Callable[..., Output]
) -> None:
    done = evaluate("--model", "exam-giver")
    assert done.code == 2
    assert "has no model 'exam-giver'; give one with --model: exam-taker" in done.err
    stub.models = ["exam-taker", "another"]
    done = evaluate()
    assert done.code == 2
    assert "has several models; give one with --model: exam-taker, another" in done.err
    assert evaluate("--model", "another").code == 0
    assert {body["model"] for body in stub.asked} == {"another"}


def test_a_server_without_log_probabilities_is_told(
    stub: Stub, evaluate: Callable[..., Output]
) -> None:
    stub.echoes = False
    done = evaluate()
    assert done.code == 2
    assert "leave them out with --no-perplexity" in done.err
    assert evaluate("--no-perplexity").code == 0


def test_no_server_is_told(
    stub: Stub, evaluate: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "url", "http://127.0.0.1:9")
    done = evaluate()
    assert done.code == 2
    assert "http://127.0.0.1:9/v1/models cannot be asked (ConnectError" in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["somewhere"], "either a checkpoint's folder or a server's --url"),
        (["--variants", "dsa,dense"], "a server serves one"),
        (["--variants", "best"], "no variant best; known: dense, dsa"),
        (["--lengths", "1M"], "--lengths is '1M'; allowed: tokens"),
        (["--lengths", "100"], "allowed: tokens, each at least 256"),
        (["--kinds", "poem"], "--kinds poem; allowed: some of single"),
        (["--questions", "0"], "--questions 0; allowed: an integer >= 1"),
        (["--num-concurrent", "0"], "have to be above 0"),
        (["--same-as", "nowhere.json"], "nowhere.json"),
        (["--max-recall-loss", "1"], "compares dsa with dense; --variants lacks one"),
    ],
)
def test_bad_input_is_told_before_anything_is_asked(
    args: list[str], message: str, stub: Stub, evaluate: Callable[..., Output]
) -> None:
    done = evaluate(*args)
    assert stub.asked == []
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
