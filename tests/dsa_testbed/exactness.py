"""The comparison at the heart of the serving tests: a server's greedy tokens and the oracle's."""

from collections.abc import Sequence
from pathlib import Path

from dsa_testbed.oracle import oracle_answers
from dsa_testbed.prompts import Prompt
from dsa_testbed.server import Server

MAX_TOKENS = 32


def mismatches(
    server: Server,
    checkpoint: Path,
    prompts: Sequence[Prompt],
    max_tokens: int,
    concurrency: int | None = 16,
) -> list[str]:
    """One line for each prompt whose tokens differ; empty when the server is exact.

    concurrency: requests at a time; None: all of them, before the server begins with the first.
    """
    asked = [prompt.tokens for prompt in prompts]
    answers = oracle_answers(checkpoint, asked, max_tokens)
    if concurrency is None:
        completions = server.generate_at_once(asked, max_tokens, ignore_eos=True)
    else:
        completions = server.generate_all(asked, max_tokens, concurrency, ignore_eos=True)
    lines = []
    for prompt, answer, completion in zip(prompts, answers, completions, strict=True):
        if completion.tokens == answer.tokens:
            continue
        pairs = zip(completion.tokens, answer.tokens, strict=False)
        first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), -1)
        lines.append(
            f"{prompt.name} ({len(prompt.tokens)} tokens) differs at output {first} of "
            f"{len(answer.tokens)}; the reference's margin there is {answer.gaps[first]:.2g}"
        )
    return lines
