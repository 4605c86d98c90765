"""The first violation of an invariant on a device, and what is said of it.

Checks run on the device, in captured graphs as elsewhere, so that none may wait for a result: they
leave the first violation in one small tensor. On a CPU it is read after each layer. On a GPU it is
copied to the host once a pass, by an event that is asked and never waited for, so that the error is
raised a pass or two later; a violation found meanwhile does not replace it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from dsa_kernels.invariants import FIELDS, Kind, Rows, keep_first

_PASSES_KEPT = 32

_TEXTS = {
    Kind.PLACE: (
        "it goes to slot {at} and sees {seen} tokens; one of them is not that of its position in "
        "its request's pages"
    ),
    Kind.LATENT_UNWRITTEN: "its latent was not written to slot {at}",
    Kind.LATENT_NAN: "its latent was written to slot {at} as NaN",
    Kind.KEY_UNWRITTEN: "its index key was not written to slot {at}",
    Kind.KEY_NAN: "its index key was written to slot {at} as NaN",
    Kind.QUERY_NAN: "its index query is NaN",
    Kind.STALE: (
        "position {at} of its request lies in a slot that was last written for position {seen}, "
        "of whatever request (-1: never, or outside of the cache)"
    ),
    Kind.READ_KEY_NAN: "the cached index key of position {at} of its request is NaN",
    Kind.ORDER: "position {at} of its selection does not come after the one before it",
    Kind.RANGE: "position {at} of its selection is none that it sees",
    Kind.COUNT: "its selection has {at} tokens, and has to have {seen}",
    Kind.PAGES: "position {at}, which it selected, was looked for in slot {seen}, not in its page",
    Kind.OUT_NAN: "its attention gave NaN: a latent that it read is NaN, or its query",
}


class Record:
    """Where the checks of one device leave what they find.

    Args:
        device: of the layers.
        at_once: read it after each layer, which has a GPU waited for, or else once a pass.
    """

    def __init__(self, device: torch.device, *, at_once: bool) -> None:
        self._first = torch.zeros(len(FIELDS), dtype=torch.int64, device=device)
        self._pass = torch.zeros(1, dtype=torch.int64, device=device)
        self._passes = 0
        self._requests: dict[int, Sequence[str]] = {}
        self._layers: list[str] = []
        self._at_once = at_once
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._copied = torch.zeros(
            len(FIELDS), dtype=torch.int64, pin_memory=self._event is not None
        )

    def add_layer(self, name: str) -> Tensor:
        """The number by which `keep` is told of the layer."""
        self._layers.append(name)
        return torch.tensor([len(self._layers) - 1], device=self._first.device)

    def begin_pass(self, requests: Sequence[str] = ()) -> None:
        """Say whose rows come now, by the host's names where it has them; not while capturing.

        Raises:
            RuntimeError: a pass before this one has violated an invariant.
        """
        self._passes += 1
        self._requests[self._passes] = requests
        self._requests.pop(self._passes - _PASSES_KEPT, None)
        self._pass.fill_(self._passes)
        if self._at_once or (self._event is not None and not self._event.query()):
            return
        self._raise(self._copied)
        self._copied.copy_(self._first, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def keep(self, rows: Rows, findings: Tensor, out: Tensor, layer: Tensor) -> None:
        """Take what a layer has found, where nothing was before.

        Args:
            rows, findings, out: of `dsa_kernels.invariants.keep_first`.
            layer: of `add_layer`.

        Raises:
            RuntimeError: `at_once`, and an invariant was violated.
        """
        keep_first(rows, findings, out, layer, self._pass, self._first)
        if self._at_once:
            self._raise(self._first)

    def _raise(self, first: Tensor) -> None:
        if first[0] == 0:
            return
        of = dict(zip(FIELDS, first.tolist(), strict=True))
        names = self._requests.get(of["pass"], ())
        name = f"{names[of['request']]} " if of["request"] < len(names) else ""
        raise RuntimeError(
            f"DSA_CHECK: layer {self._layers[of['layer']]}, request {name}(row {of['request']} of "
            f"the batch's requests), token row {of['row']}, position {of['position']}: "
            f"{_TEXTS[Kind(of['kind'])].format(**of)}. This is a fault of the plugin, the host, "
            "the checkpoint or the machine, not of the request. Please report it with this line "
            "and what `dsa doctor --bundle` writes."
        )


@cache
def record_of(device: torch.device) -> Record:
    """The device's one record."""
    return Record(device, at_once=device.type == "cpu")
