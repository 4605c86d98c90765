"""`dsa verify --url` beside real servers: right ones pass, and a planted fault is named."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsa_plugin.server_check.report import Report
from dsa_plugin.server_check.run import check_server
from dsa_plugin.server_check.settings import Settings
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.engine import through_a_store
from dsa_testbed.hosts import HOSTS

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
LENGTHS, CHUNK = (48, 192, 700), 256
# So that cold and cached are known to be so.
FLAGS = {
    "vllm": ["--tokenizer-mode", "hf", "--enable-prompt-tokens-details"],
    "sglang": ["--enable-cache-report"],
}
VERDICTS = {
    None: "right",
    "indexer_rope_style": "wrong past index_topk",
    "stale_index_page": "wrong past index_topk",
    "topk_minus_one": "wrong past index_topk",
    "softmax_scale": "wrong everywhere",
}

pytestmark = [pytest.mark.serving, pytest.mark.matrix]


@pytest.mark.parametrize("mutation", VERDICTS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_server_is_judged(host: str, mutation: str | None) -> None:
    report = judged(host, DEMO, mutation)
    assert report.verdict == VERDICTS[mutation], report.as_json()
    assert not [note for note in report.notes if "cache" in note]


@pytest.mark.parametrize(
    "settings", [("bf16",), ("bf16", "fp8_caches"), ("exact", "fp8_caches")], ids="-".join
)
@pytest.mark.parametrize("host", HOSTS)
def test_rounding_is_right(host: str, settings: tuple[str, ...]) -> None:
    assert judged(host, DEMO, None, settings=settings).verdict == "right"


@pytest.mark.parametrize(
    ("mutation", "verdict"), [(None, "right"), ("shared_selection_lost", "wrong past index_topk")]
)
@pytest.mark.parametrize("host", HOSTS)
def test_layers_that_share(host: str, mutation: str | None, verdict: str) -> None:
    """Of random weights, which answer nothing right: by log-probabilities alone."""
    report = judged(host, make_checkpoint("glm52"), mutation)
    assert report.verdict == verdict, report.as_json()


@pytest.mark.parametrize(
    ("mutation", "verdict"),
    [(None, "right"), ("connector_loses_index_keys", "wrong only when cached")],
)
def test_a_connector(mutation: str | None, verdict: str, tmp_path: Path) -> None:
    connector = through_a_store(tmp_path)["kv_transfer_config"]
    flags = ["--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(connector)]
    # It stores of a prompt what its first chunk wrote.
    flags += ["--max-num-batched-tokens", "4096"]
    report = judged("vllm", DEMO, mutation, flags)
    assert report.verdict == verdict, report.as_json()


def judged(
    host: str,
    model: Path,
    mutation: str | None,
    flags: Sequence[str] = (),
    settings: Sequence[str] = ("exact",),
) -> Report:
    args, env = HOSTS[host].settings(*settings)
    args = [*args, *FLAGS[host], *flags]
    with HOSTS[host].server(model, args, env, mutation=mutation) as server:
        report = check_server(
            Settings(
                server.base_url,
                checkpoint=model,
                chunk=CHUNK,
                lengths=LENGTHS,
                questions=4,
            ),
            lambda *_: None,
        )
    print(host, mutation, report.as_json())
    assert report.problem is None
    return report
