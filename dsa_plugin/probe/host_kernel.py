"""HostKernel: what a host says of one op of its own DSA, by its own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Op = Literal["cache_write", "indexer_logits", "topk_select", "sparse_mla"]
Verdict = Literal["yes", "no", "unchecked"]


@dataclass(frozen=True)
class HostKernel:
    """One op without the plugin.

    Attributes:
        verdict: yes: the host's code checks the device, and takes it. no: it refuses. unchecked: it
            asks nobody before the kernel runs, so whether that works is not known.
        text: what it would run; of a refusal, the host's own words.
    """

    op: Op
    verdict: Verdict
    text: str


def ask_host_code(
    op: Op, check: Callable[[], str], *refusals: type[Exception], instead: str = ""
) -> HostKernel:
    """Call the host's code: it returns what it runs, or raises one of `refusals`.

    Any other exception means that this release cannot be asked so, which says nothing about the
    device.

    Args:
        instead: what the host would run, where it cannot be asked.
    """
    try:
        return HostKernel(op, "yes", check())
    except refusals as refusal:
        return HostKernel(op, "no", str(refusal))
    except Exception as error:  # noqa: BLE001  whatever it is, it is no answer
        unasked = f"could not be asked: {type(error).__name__}: {error}"
        return HostKernel(op, "unchecked", f"{instead}; {unasked}" if instead else unasked)
