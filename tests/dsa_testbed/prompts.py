"""The prompt sets of the exactness tests, as token ids; the same on every machine."""

import random
from dataclasses import dataclass

from dsa_testbed.small_models import VOCAB_SIZE
from dsa_testbed.tokenizer import encode, shipped_text
from dsa_testbed.weights import NUM_SPECIAL_TOKENS

# At and around index_topk and page (64, 128; a host's page may be 16), the chunk of a chunked
# prefill (256, 1024), and past 4096, the window DeepSeek-V3.2 was extended from.
EDGE_LENGTHS = (
    *(1, 2, 3, 15, 16, 17, 40, 48, 56, 60, 62, 63, 64, 65, 66, 79, 80, 81, 96, 127, 128, 129, 130),
    *(160, 191, 192, 193, 255, 256, 257, 258, 320, 511, 512, 513, 640, 768, 1023, 1024, 1025, 1088),
    *(1280, 2049, 4095, 4096, 4097, 4200),
)
# (prefix length, lengths after it): hits of the prefix cache that end on and beside a page's edge.
PREFIX_GROUPS = (
    (256, (1, 17, 63, 64, 65)),
    (300, (3, 64, 90, 120)),
    (512, (2, 40, 100, 129)),
    (1024, (1, 33, 64, 200)),
    (1500, (10, 70, 300)),
)
RANDOM_LENGTHS = (65, 100, 129, 257, 400, 700, 1100, 4129)
CI_LENGTHS = (1, 2, 17, 60, 63, 64, 65, 128, 129, 256, 257, 640, 4097)
CI_PREFIX_GROUPS = ((256, (1, 64, 65)), (300, (64, 90)))
CI_RANDOM_LENGTHS = (100, 400)


@dataclass(frozen=True)
class Prompt:
    """Token ids and a name for reports."""

    name: str
    tokens: list[int]


def full_set() -> list[Prompt]:
    """75 prompts, for `make test-all`."""
    return _build(EDGE_LENGTHS, PREFIX_GROUPS, RANDOM_LENGTHS)


def ci_set() -> list[Prompt]:
    """20 prompts of the full set, for `make test`."""
    return _build(CI_LENGTHS, CI_PREFIX_GROUPS, CI_RANDOM_LENGTHS)


def pressure_set() -> list[Prompt]:
    """44 prompts, asked at once, of 2 pages each that all grow into a third within 32 tokens.

    Later ones are longer, so that all grow at about the same step where they start one by one.
    """
    return [Prompt(f"pressure-{i}", random_tokens(50_000 + i, 100 + i // 3)) for i in range(44)]


def text_tokens(start: int, length: int) -> list[int]:
    """``length`` tokens of the shipped text from token ``start``; the text repeats at its end."""
    ids = encode(shipped_text(), VOCAB_SIZE)
    repeats = 1 + (start + length) // len(ids)
    return (ids * repeats)[start : start + length]


def random_tokens(seed: int, length: int) -> list[int]:
    """Uniform over the vocabulary without special tokens."""
    draw = random.Random(f"prompt {seed}")
    return [draw.randrange(NUM_SPECIAL_TOKENS, VOCAB_SIZE) for _ in range(length)]


def _build(
    lengths: tuple[int, ...],
    groups: tuple[tuple[int, tuple[int, ...]], ...],
    random_lengths: tuple[int, ...],
) -> list[Prompt]:
    # Every prompt starts elsewhere in the text, or all would share their prefix.
    prompts = [Prompt(f"text-{n}", text_tokens(37 * n, n)) for n in lengths]
    for prefix, tails in groups:
        shared = text_tokens(91 * prefix + 5, prefix)
        prompts += [
            Prompt(f"prefix-{prefix}+{tail}", shared + random_tokens(1000 * prefix + tail, tail))
            for tail in tails
        ]
    return prompts + [Prompt(f"random-{n}", random_tokens(n, n)) for n in random_lengths]
