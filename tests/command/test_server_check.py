"""`dsa verify --url`: the class of fault it names, and what it says of a server that fails."""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

import pytest

from dsa_plugin import cli
from dsa_plugin.cli.verify_url import verify_url
from dsa_plugin.evaluation import completions
from dsa_plugin.server_check.settings import Settings
from dsa_testbed.failing_replies import drop, late, status
from dsa_testbed.fake_server import FakeServer, KnowsAll, Rule, Seen

LENGTHS = (48, 256)
INDEX_TOPK, QUESTIONS = 64, 4
_DRAW = random.Random(0)


class Output(NamedTuple):
    code: int
    out: str
    err: str

    def verdict(self) -> str:
        """Of the JSON output."""
        return str(json.loads(self.out)["verdict"])


Check = Callable[..., Output]


@pytest.fixture(scope="module")
def brain() -> KnowsAll:
    return KnowsAll(0, LENGTHS, 2 * QUESTIONS)


@pytest.fixture
def server(brain: KnowsAll, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(completions, "_PAUSE_SECONDS", 0.01)
    with FakeServer(brain) as server:
        yield server


@pytest.fixture
def check(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Check:
    """Checks the server and returns what was printed."""

    def run(*, as_json: bool = False, **changed: Any) -> Output:
        given: dict[str, Any] = {
            "url": server.url,
            "index_topk": INDEX_TOPK,
            "lengths": LENGTHS,
            "questions": QUESTIONS,
        }
        code = verify_url(Settings(**given | changed), as_json=as_json)
        shown = capsys.readouterr()
        return Output(code, shown.out, shown.err)

    return run


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (lambda _seen: False, "right"),
        (lambda seen: seen.cached and seen.tokens > INDEX_TOPK, "wrong only when cached"),
        (lambda seen: seen.batch, "wrong only in a batch"),
    ],
)
def test_the_class_of_a_fault_is_named(
    wrong: Rule, verdict: str, server: FakeServer, check: Check
) -> None:
    server.wrong = wrong
    done = check(as_json=True, questions=8)
    assert done.verdict() == verdict
    assert done.code == (verdict != "right")


def test_the_command_hands_on_what_it_is_given(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.wrong = lambda seen: seen.tokens > INDEX_TOPK
    flags = f"--index-topk {INDEX_TOPK} --questions {2 * QUESTIONS} --num-concurrent 2 --json"
    lengths = ",".join(map(str, LENGTHS))
    given = ["--url", server.url, "--model", server.model, "--lengths", lengths, *flags.split()]
    monkeypatch.setattr(sys, "argv", ["dsa", "verify", *given])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "wrong past index_topk"
    assert len(server.asked) == len(LENGTHS) * 2 * QUESTIONS * 4
    assert server.most_at_once == 2


def test_what_is_asked_is_bounded_and_cold_or_cached(server: FakeServer, check: Check) -> None:
    assert check(num_concurrent=3).code == 0
    assert len(server.asked) == len(LENGTHS) * QUESTIONS * 4
    assert 2 <= server.most_at_once <= 3
    prompts = [body["prompt"] for body in server.asked]
    assert all(prompts.count(prompt) == 2 for prompt in prompts)
    starts = {prompt[:6] for prompt in prompts}
    assert len(starts) > 0.9 * len(prompts) / 2
    assert all(body["temperature"] == 0 and body["model"] == server.model for body in server.asked)


def test_the_output_says_what_it_rests_on(server: FakeServer, check: Check) -> None:
    server.wrong = lambda seen: seen.tokens > INDEX_TOPK
    done = check(questions=8)
    assert "8 of 8" in done.out
    assert "0 of 8 from" in done.out
    assert "likely: the indexer" in done.out
    assert done.out.splitlines()[-1].startswith("verdict: wrong past index_topk (DeepSeek-V3.2 at ")
    found = json.loads(check(questions=8, as_json=True).out)
    [finding] = found["findings"]
    assert finding["tokens"] > INDEX_TOPK
    assert found["cells"][4]["wrong_answers"] == [" Nobody knows."] * 8
    assert len(found["cells"]) == 8


def _no_text(handler: Any, _number: int) -> bool:
    handler.reply({"choices": [{"message": "Hello"}]})
    return True


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (drop, "cannot be asked (RemoteProtocolError"),
        (status(500), "failed with 500: CUDA error: out of luck; tried 3 times"),
        (status(404), "refused the request with 404"),
        (status(401), "refused the request with 401"),
        (late(1), "did not answer within 0.2 s; give it longer with --timeout"),
        (_no_text, "answered without a text: {'message': 'Hello'}"),
    ],
)
@pytest.mark.parametrize("from_number", [0, 10])
def test_a_server_that_fails_is_unusable(
    fail: Callable[[Any, int], bool],
    message: str,
    from_number: int,
    server: FakeServer,
    check: Check,
) -> None:
    server.fail = lambda handler, number: number >= from_number and fail(handler, number)
    start = time.monotonic()
    done = check(timeout=0.2)
    assert time.monotonic() - start < 5
    assert done.code == 2
    assert message in done.err
    assert "verdict: server unusable" in done.out
    at = "alone, cold" if from_number == 0 else "in a batch, cold"
    assert f"at 48 tokens, {at}:" in done.err


def test_what_was_found_before_a_failure_counts(server: FakeServer, check: Check) -> None:
    server.wrong = lambda seen: seen.tokens > INDEX_TOPK
    server.fail = lambda handler, number: number >= 7 * 8 and drop(handler, number)
    done = check(questions=8)
    assert done.code == 1
    assert "verdict: wrong past index_topk" in done.out
    assert "cannot be asked" in done.err


def test_one_failure_is_no_failure(server: FakeServer, check: Check) -> None:
    server.fail = lambda handler, number: number == 20 and drop(handler, number)
    assert check().code == 0


def test_no_server_is_told(check: Check) -> None:
    done = check(url="http://127.0.0.1:9", as_json=True)
    assert (done.code, done.verdict()) == (2, "server unusable")
    assert "is the server up?" in json.loads(done.out)["problem"]


@pytest.mark.parametrize(("delay", "verdict"), [(1.0, "server unusable"), (0.1, "undecided")])
def test_a_budget_ends_a_slow_server(
    delay: float, verdict: str, server: FakeServer, check: Check
) -> None:
    def slow(_handler: BaseHTTPRequestHandler, _number: int) -> bool:
        time.sleep(delay)
        return False

    server.fail = slow
    start = time.monotonic()
    done = check(budget_s=1.5)
    assert time.monotonic() - start < 5
    assert done.code == 2
    assert "the budget of 1.5 s ended at " in done.err
    assert f"verdict: {verdict}" in done.out


def test_a_server_that_answers_as_another_model_is_told(server: FakeServer, check: Check) -> None:
    server.answers_as = "Llama-2-7B"
    done = check()
    assert "says that it answered as Llama-2-7B" in done.out


def test_another_model_behind_the_name_knows_nothing(server: FakeServer, check: Check) -> None:
    server.wrong = lambda _seen: _DRAW.random() < 0.95
    done = check()
    assert done.code == 1
    assert "likely: other weights than it says" in done.out


def test_a_model_is_named(server: FakeServer, check: Check) -> None:
    with pytest.raises(ValueError, match=r"has no model 'GLM-5'; give one with --model: DeepSeek"):
        check(model="GLM-5")
    server.model = "my-model"
    with pytest.raises(ValueError, match="my-model is no model that is known here: say its index_"):
        check(index_topk=None)


def test_index_topk_is_that_of_the_registered_model(server: FakeServer, check: Check) -> None:
    server.model = server.answers_as = "deepseek-ai/DeepSeek-V3.2"
    with pytest.raises(ValueError, match="lie all on one side of index_topk 2048"):
        check(index_topk=None)


def test_a_cache_that_is_not_seen_is_told(server: FakeServer, check: Check) -> None:
    server.tells_cached = False
    assert "does not say what came from its prefix cache" in check().out
    server.tells_cached = True
    assert "prefix cache" not in check().out


def test_a_short_context_is_told(server: FakeServer, check: Check) -> None:
    server.max_model_len = 512
    done = check(lengths=(*LENGTHS, 480))
    assert done.code == 0
    assert "not asked, as the server takes 512: 480" in done.out


def test_a_refusal_of_long_requests_is_told(server: FakeServer, check: Check) -> None:
    def refuse(handler: Any, _number: int) -> bool:
        too_long = len(server.asked[-1]["prompt"]) > 4 * 400
        return too_long and status(400)(handler, 0)

    server.fail = refuse
    done = check(lengths=(*LENGTHS, 480))
    assert done.code == 0
    assert "not asked from 480 tokens on: " in done.out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"url": "localhost:8000"}, "--url localhost:8000; give it as http"),
        ({"questions": 1}, "--questions 1; fewer than 4 show little"),
        ({"num_concurrent": 1}, "--num-concurrent 1; a batch has 2 at least"),
        ({"budget_s": 0}, "--timeout and --budget-s are seconds above 0"),
        ({"index_topk": 0}, "--index-topk 0; allowed: tokens, at least 40"),
        ({"chunk": -1}, "--chunk -1; allowed"),
        ({"lengths": ()}, "--lengths []; allowed"),
        ({"lengths": (8, 2000)}, "--lengths \\[8, 2000]; allowed"),
        ({"lengths": (256, 512)}, "lie all on one side of index_topk 64"),
    ],
)
def test_bad_input_is_told_before_anything_is_asked(
    changed: dict[str, Any], message: str, server: FakeServer, check: Check
) -> None:
    with pytest.raises(ValueError, match=message.replace("[]", r"\[]")):
        check(**changed)
    assert server.asked == []


def test_a_rule_sees_what_it_needs(server: FakeServer, check: Check) -> None:
    """The tests above plant their faults by it."""
    seen: list[Seen] = []

    def note(request: Seen) -> bool:
        seen.append(request)
        return False

    server.wrong = note
    check()
    alone, cached, batch, both = (seen[at : at + QUESTIONS] for at in range(0, 16, QUESTIONS))
    assert not any(request.batch for request in alone + cached)
    assert any(request.batch for request in batch + both)
    assert not any(request.cached for request in alone + batch)
    assert all(request.cached for request in cached + both)
