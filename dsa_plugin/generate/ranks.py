"""Tensor parallelism: each rank has some heads, experts, columns and rows, and sums are shared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of one model; alone, nothing is sent.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: that it computes on.
    """

    rank: int
    size: int
    device: torch.device

    def share(self, whole: int) -> int:
        """This rank's part of something that divides evenly."""
        return whole // self.size

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in x itself; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def concatenate(self, x: Tensor) -> Tensor:
        """The ranks' x [n, width] beside each other, [n, size * width]."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def agree(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, in x itself."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def agree_on_prompts(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rank 0's prompts on every rank; the others' own are ignored."""
        if self.size == 1:
            return [list(prompt) for prompt in prompts]
        count = int(self.agree(self._integers([len(prompts)])))
        if not count:
            return []
        mine = self.rank == 0
        lengths = self.agree(self._integers([len(p) for p in prompts] if mine else [0] * count))
        tokens = [t for p in prompts for t in p] if mine else [0] * int(lengths.sum())
        flat = self.agree(self._integers(tokens))
        return [part.tolist() for part in flat.split(lengths.tolist())]

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def join(device: str) -> Ranks:
    """This process's place: alone, or as torchrun's environment says; joins the others.

    Args:
        device: cpu, or cuda: the GPU of the local rank.

    Raises:
        ValueError: cuda, and torch finds too few GPUs.
    """
    rank, local, size = (
        int(os.environ.get(name, alone))
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    )
    if device == "cuda" and torch.cuda.device_count() <= local:
        raise ValueError(
            f"--device cuda for local rank {local}, and torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} GPUs; use --device cpu or fewer ranks"
        )
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Ranks(rank, size, place)


def leave(ranks: Ranks) -> None:
    """Give back what `join` took."""
    if ranks.size > 1:
        dist.destroy_process_group()
