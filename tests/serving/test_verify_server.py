"""`dsa verify --url` beside real servers: right ones pass, and a planted fault is named."""

from pathlib import Path

import pytest

from dsa_plugin.server_check.run import check_server
from dsa_plugin.server_check.settings import Settings
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
}


@pytest.mark.serving
@pytest.mark.matrix
@pytest.mark.parametrize("mutation", VERDICTS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_server_is_judged(host: str, mutation: str | None) -> None:
    args, env = HOSTS[host].settings("exact")
    with HOSTS[host].server(DEMO, [*args, *FLAGS[host]], env, mutation=mutation) as server:
        report = check_server(
            Settings(
                server.base_url,
                checkpoint=DEMO,
                chunk=CHUNK,
                lengths=LENGTHS,
                questions=4,
            ),
            lambda *_: None,
        )
    print(host, mutation, report.as_json())
    assert report.verdict == VERDICTS[mutation], report.as_json()
    assert report.problem is None
    assert not [note for note in report.notes if "cache" in note]
