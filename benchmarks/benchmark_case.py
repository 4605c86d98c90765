"""What an op's cases give to kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peers import Peers, Run
from torch import Tensor

L2_BYTES = 256 << 20  # no chip's second-level cache is larger
USUAL_CONTEXT = 32 << 10


@dataclass(frozen=True)
class Scale:
    """Where and how large.

    Attributes:
        device: of all tensors.
        tiny: shapes for a CPU under Triton's interpreter.
        peers: other libraries.
    """

    device: torch.device
    tiny: bool
    peers: Peers

    def copies(self, nbytes: int) -> int:
        """How many copies of inputs of that size make a round: some, where a call takes no time."""
        return 1 if self.tiny else max(1, min(32, L2_BYTES // nbytes))


def as_it_is(result: Tensor) -> Tensor:
    """The result of most ops can be compared as it is."""
    return result


@dataclass(frozen=True)
class Calls:
    """What is timed, on inputs that lie on the device.

    Attributes:
        ours: the op on each copy of the inputs, returning what is compared.
        peers: the same of another library, or why it is absent.
        comparable: what of the first copy's result has to agree.
    """

    ours: list[Run]
    peers: dict[str, list[Run] | str]
    comparable: Callable[[Tensor], Tensor] = as_it_is


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op, shape: what the row is called.
        order: how many of its sizes are not the usual ones; the least are measured first.
        flops, bytes: the least work, from which the roofline's time follows; flops of products.
        tolerance: root mean square of a peer's difference, relative to our result's.
        make: the calls, when their turn comes: inputs take time and memory.
        fp8: whether the products are of fp8.
    """

    op: str
    shape: str
    order: int
    flops: int
    bytes: int
    tolerance: float
    make: Callable[[], Calls]
    fp8: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"
