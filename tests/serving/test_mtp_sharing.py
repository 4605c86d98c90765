"""GLM-5.2's MTP steps after the first reuse the first one's selection, if its config says so."""

from collections import Counter
from pathlib import Path

import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.hosts import HOSTS
from dsa_testbed.prompts import text_tokens
from dsa_testbed.server import op_counts

pytestmark = [pytest.mark.serving, pytest.mark.matrix]


def calls(host: str, share: bool, scratch: Path) -> Counter[str]:
    """Calls of each op for one request all of whose contexts are longer than index_topk."""
    checkpoint = make_checkpoint("glm52", index_share_for_mtp_iteration=share)
    args, env = HOSTS[host].settings("exact", "mtp")
    counts = scratch / f"share_{share}"
    with HOSTS[host].server(checkpoint, args, env | {"DSA_OP_COUNTS": str(counts)}) as server:
        server.complete(text_tokens(0, 100), 4, ignore_eos=True)
        before = op_counts(counts)
        server.complete(text_tokens(1000, 200), 32, ignore_eos=True)
        return op_counts(counts) - before


@pytest.mark.parametrize("host", HOSTS)
def test_later_steps_select_nothing(host: str, tmp_path: Path) -> None:
    # A pass of the target attends in 6 layers, 4 of which select; two steps of the one-layer draft
    # follow it, but for one that a host may leave out at the request's end.
    for share, selecting in ((True, 4 + 1), (False, 4 + 2)):
        ops = calls(host, share, tmp_path)
        print(f"{host}, shared: {share}: {dict(ops)}")
        assert ops["index_query"] > 0
        assert abs(ops["index_query"] * (6 + 2) - ops["sparse_mla"] * selecting) < 6 + 2
