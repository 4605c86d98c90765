"""`dsa verify CHECKPOINT --url` beside servers of the demo model, some with a fault planted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_plugin.server_check import run
from dsa_plugin.server_check.reference import Reference
from dsa_plugin.server_check.report import Report
from dsa_plugin.server_check.run import check_server
from dsa_plugin.server_check.settings import Settings
from dsa_testbed.fake_server import Checkpoint, FakeServer, Rule

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
SHORT, LONGER = (48, 128), (48, 128, 384)
pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def brain() -> Checkpoint:
    return Checkpoint(DEMO)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(DEMO)


@pytest.fixture
def server(
    brain: Checkpoint, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeServer]:
    # The same prompts in each test, so that what both computed of them is still known.
    numbers = iter(range(1_000_000))
    monkeypatch.setattr(run, "draw_nonce", lambda: f"{next(numbers):06}. ")
    monkeypatch.setattr(run, "Reference", lambda _folder: reference)
    with FakeServer(brain) as server:
        yield server


def check(server: FakeServer, **given: Any) -> Report:
    settings: dict[str, Any] = {"checkpoint": DEMO, "lengths": SHORT, "questions": 4}
    return check_server(Settings(server.url, **settings | given), lambda *_: None)


def plant(server: FakeServer, brain: Checkpoint, variant: str, rule: Rule, start: int = 0) -> None:
    brain.variant, brain.wrong_from = variant, start
    server.wrong = rule


def test_a_right_server_is_right(server: FakeServer) -> None:
    report = check(server)
    assert (report.verdict, report.notes) == ("right", [])
    assert report.index_topk == 64
    assert {band.mode.name for band in report.bands} == {
        f"{how}, {what}" for how in ("alone", "in a batch") for what in ("cold", "cached")
    }
    assert max(band.largest for band in report.bands) < 1e-4
    right = [answer.right for answer in report.answers]
    assert sum(right) > 0.7 * len(right), right


@pytest.mark.parametrize(
    ("variant", "is_wrong", "start", "verdict"),
    [
        *(
            (variant, lambda _seen: True, 0, "wrong past index_topk")
            for variant in ("topk_minus_one", "dense", "indexer_rope_style", "stale_index_page")
        ),
        ("random", lambda seen: seen.tokens > 256, 256, "wrong past a chunk"),
        ("stale_index_page", lambda seen: seen.cached, 0, "wrong only when cached"),
        ("hadamard_one_side", lambda seen: seen.batch, 0, "wrong only in a batch"),
    ],
)
def test_each_fault_is_named(
    variant: str,
    is_wrong: Rule,
    start: int,
    verdict: str,
    server: FakeServer,
    brain: Checkpoint,
) -> None:
    plant(server, brain, variant, is_wrong, start)
    assert check(server, lengths=LONGER, chunk=256).verdict == verdict


@pytest.mark.parametrize("seed", range(20))
def test_a_right_server_is_right_whatever_is_asked(seed: int, server: FakeServer) -> None:
    report = check(server, seed=seed, checkpoint=None, index_topk=64, lengths=(48, 256))
    assert report.verdict == "right"


def test_bf16_is_right_too(server: FakeServer) -> None:
    server.brain = rounded = Checkpoint(DEMO, torch.bfloat16)
    assert check(server, lengths=LONGER).verdict == "right"
    plant(server, rounded, "indexer_rope_style", lambda _seen: True)
    assert check(server, lengths=LONGER).verdict == "wrong past index_topk"
