"""The exactness test has power: with one thing broken inside the live server, tokens differ.

`make test-all` runs every mutation on every host, `make test` the two subtlest, one on each;
`pytest -rP` prints how many prompts noticed each.
"""

import pytest

from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.exactness import MAX_TOKENS, mismatches
from dsa_testbed.hosts import HOSTS
from dsa_testbed.mutations import FAULTS
from dsa_testbed.prompts import ci_set

IN_CI = {("vllm", "topk_minus_one"), ("sglang", "index_key_not_written_short_prompt")}


def _params() -> list[object]:
    return [
        pytest.param(
            host,
            family,
            mutation,
            id=f"{host} {family} {mutation}",
            marks=[
                pytest.mark.serving,
                *([] if (host, mutation) in IN_CI else [pytest.mark.matrix]),
            ],
        )
        for host in HOSTS
        for family, mutation in FAULTS
    ]


@pytest.mark.parametrize(("host", "family", "mutation"), _params())
def test_a_mutation_is_noticed(host: str, family: str, mutation: str) -> None:
    checkpoint = make_checkpoint(family)
    # Those past 4,096 tokens add minutes and no power.
    prompts = [prompt for prompt in ci_set() if len(prompt.tokens) < 1000]
    args, env = HOSTS[host].settings("exact")
    with HOSTS[host].server(checkpoint, args, env, mutation=mutation) as server:
        assert f"dsa test mutation applied: {mutation}" in server.log_text()
        noticed = mismatches(server, checkpoint, prompts, MAX_TOKENS)
    print(f"{host} {family} {mutation}: {len(noticed)} of {len(prompts)} prompts differ")
    assert noticed
