"""`dsa verify CHECKPOINT --url`: what it compares of a server's log-probabilities, and says."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin.cli.verify_url import verify_url
from dsa_plugin.server_check import run
from dsa_plugin.server_check.reference import Reference
from dsa_plugin.server_check.settings import Settings
from dsa_testbed.fake_server import FakeServer, Json, KnowsAll

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
LENGTHS, INDEX_TOPK, QUESTIONS = (48, 256), 64, 4
ROUNDING = 0.03


class Made:
    """A reference without a model: a token is four characters, its log-probability a digest."""

    def __init__(self, _checkpoint: Path) -> None:
        self.texts: dict[tuple[int, ...], str] = {}

    def tokens(self, text: str) -> list[int]:
        found = [digest(text[at : at + 4]) for at in range(0, len(text), 4)]
        self.texts[tuple(found)] = text
        return found

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        return [-(digest(str(pair)) % 1000) / 250 for pair in pairwise(tokens)]

    def rounding(self, tokens: Sequence[int]) -> list[float]:
        return [ROUNDING] * (len(tokens) - 1)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big")


class AsReference(KnowsAll):
    """Answers with the reference's log-probabilities, `error` nats off at positions from `start`.

    Attributes: `tells`, whether it gives log-probabilities; `always`, whether right requests too
    are off.
    """

    def __init__(self, reference: Made) -> None:
        super().__init__(0, LENGTHS, QUESTIONS)
        self.reference = reference
        self.error, self.start, self.tells, self.always = 0.0, 0, True, True

    def answer(self, prompt: str | list[int], body: Json, *, wrong: bool) -> Json:
        assert isinstance(prompt, list)
        choice = super().answer(self.reference.texts[tuple(prompt)], body, wrong=False)
        if not self.tells:
            return choice
        said = [digest(f"{choice['text']} {number}") for number in range(12)]
        known = self.reference.logprobs([*prompt, *said])
        off = self.error if wrong or self.always else 0.0
        made = [value - off * (at >= self.start) for at, value in enumerate(known, 1)]
        if body.get("echo"):
            return choice | {"logprobs": {"token_logprobs": [None, *made[: len(prompt)]]}}
        logprobs = made[len(prompt) - 1 :]
        return choice | {"logprobs": {"token_logprobs": logprobs}, "token_ids": said}


@pytest.fixture
def brain() -> AsReference:
    return AsReference(Made(DEMO))


@pytest.fixture
def server(brain: AsReference, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(run, "Reference", lambda _folder: brain.reference)
    with FakeServer(brain) as server:
        yield server


def check(server: FakeServer, **given: Any) -> int:
    settings: dict[str, Any] = {"checkpoint": DEMO, "lengths": LENGTHS, "questions": QUESTIONS}
    return verify_url(Settings(server.url, **settings | given), as_json=False)


def test_a_right_server_is_right(
    server: FakeServer, brain: AsReference, capsys: pytest.CaptureFixture[str]
) -> None:
    brain.error = 0.02
    assert check(server) == 0
    out = capsys.readouterr().out
    assert "distance of log-probabilities" in out
    assert "from 64 on" in out
    assert "note" not in out
    assert all(isinstance(body["prompt"], list) for body in server.asked)
    echoes = [body for body in server.asked if body.get("echo")]
    assert len(echoes) == len(LENGTHS)


@pytest.mark.parametrize(
    ("error", "start", "verdict"),
    [
        (0.4, 0, "wrong everywhere"),
        (0.002, INDEX_TOPK, "wrong past index_topk"),
        (0.002, 128, "wrong past a chunk"),
    ],
)
def test_a_fault_is_named_by_its_positions(
    error: float,
    start: int,
    verdict: str,
    server: FakeServer,
    brain: AsReference,
    capsys: pytest.CaptureFixture[str],
) -> None:
    brain.error, brain.start = error, start
    assert check(server, chunk=128) == 1
    out = capsys.readouterr().out
    assert f"{verdict}, by log-probabilities" in out
    assert f"verdict: {verdict}" in out


def test_a_fault_of_cached_requests_alone_is_named(
    server: FakeServer, brain: AsReference, capsys: pytest.CaptureFixture[str]
) -> None:
    brain.error, brain.start, brain.always = 0.1, INDEX_TOPK, False
    server.wrong = lambda seen: seen.cached
    assert check(server) == 1
    assert "verdict: wrong only when cached" in capsys.readouterr().out


def test_a_server_without_log_probabilities_is_told(
    server: FakeServer, brain: AsReference, capsys: pytest.CaptureFixture[str]
) -> None:
    brain.tells = False
    assert check(server) == 0
    out = capsys.readouterr().out
    assert "note: the server sends no token ids of its answers" in out
    assert "note: the server gives no log-probabilities of prompts" in out
    assert "distance of" not in out


def test_a_large_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsa_plugin.server_check.reference._MAX_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="leave CHECKPOINT out and give --index-topk"):
        Reference(DEMO)
