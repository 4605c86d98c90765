"""What can be wrong with a server, as seen from outside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """A class of faults; the first ones hide or explain those after them."""

    EVERYWHERE = "wrong everywhere"
    PAST_INDEX_TOPK = "wrong past index_topk"
    PAST_CHUNK = "wrong past a chunk"
    CACHED = "wrong only when cached"
    BATCH = "wrong only in a batch"
    LONG_RANGE = "wrong at long range only"


LIKELY_CAUSES = {
    Fault.EVERYWHERE: "other weights than it says, or a fault outside the indexer",
    Fault.PAST_INDEX_TOPK: "the indexer, its key cache or the top-k selection (RoPE style, stale "
    "or missing index keys, Hadamard on one side, top-k off)",
    Fault.PAST_CHUNK: "a chunk of prefill does not see the index keys or latents of those before "
    "it",
    Fault.CACHED: "a prefix-cache hit, or a KV connector, that brings latents without index keys",
    Fault.BATCH: "requests that read each other's pages, offsets or selections",
    Fault.LONG_RANGE: "positions or offsets that overflow, a RoPE table that ends; or the model's "
    "own limit: compare with its published recall",
}


@dataclass(frozen=True)
class Finding:
    """A fault and why it is one.

    Attributes:
        fault: its class.
        tokens: of the shortest request, or the first position, that shows it.
        evidence: counts or errors, in words.
        by: what was judged: answers or log-probabilities.
    """

    fault: Fault
    tokens: int
    evidence: str
    by: str


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Findings, those that explain others first; the first names the verdict."""
    order = list(Fault)
    return sorted(findings, key=lambda finding: order.index(finding.fault))


def onset(last_right: int, first_wrong: int, index_topk: int, chunk: int | None) -> Fault:
    """The class of what is right up to one number of tokens and wrong from another on."""
    if last_right <= index_topk < first_wrong:
        return Fault.PAST_INDEX_TOPK
    if chunk is not None and last_right <= chunk < first_wrong:
        return Fault.PAST_CHUNK
    return Fault.LONG_RANGE
