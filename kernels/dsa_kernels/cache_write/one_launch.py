"""Ops of cache_write that share a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from dsa_kernels.arch import Arch


@dataclass(frozen=True)
class Job:
    """What one op asks of the kernel.

    Attributes:
        name: which op; the names of its parameters in the kernel begin with it.
        programs: how many do it.
        arguments: by the rest of their names.
    """

    name: str
    programs: int
    arguments: Mapping[str, Any]


Run = Callable[[Sequence[Job], Arch], None]


@dataclass(frozen=True)
class _Submitted:
    job: Job
    arch: Arch
    run: Run


# Not a global: a host may overlap two batches in two threads.
_waiting: ContextVar[list[_Submitted] | None] = ContextVar("_waiting", default=None)


@contextmanager
def one_launch() -> Iterator[None]:
    """Where kernels run, what cache_write's ops do within is enqueued at its end, in one launch.

    So each op may be called once, for tensors of one device, and until the end nothing may read
    what another call within writes. Where none run, each op does its work when it is called.

    Raises:
        ValueError: an op was called twice.
    """
    waiting: list[_Submitted] = []
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)
    if waiting:
        first = waiting[0]
        first.run([each.job for each in waiting], first.arch)


def submit(job: Job, arch: Arch, run: Run) -> None:
    """Run a job, or keep it until the end of `one_launch`."""
    waiting = _waiting.get()
    if waiting is None:
        run([job], arch)
        return
    if any(job.name == each.job.name for each in waiting):
        raise ValueError(
            f"one_launch: an op was called twice (its part is {job.name!r}); a launch has one "
            "place for each: call it outside, or in a one_launch of its own"
        )
    waiting.append(_Submitted(job, arch, run))
