"""A checkpoint cut for the ranks of `dsa generate`: a file for each, with what it reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from dsa_plugin.convert.companions import CONFIG
from dsa_plugin.convert.compare import (
    Compared,
    Piece,
    check_finished,
    in_threads,
    measured,
    unknown,
)
from dsa_plugin.convert.formats import Output, in_order
from dsa_plugin.convert.plan import Plan, check_apart
from dsa_plugin.convert.rows import read_cut, rows_at_once
from dsa_plugin.convert.source import Source, Stored, open_source, read_shard
from dsa_plugin.generate.config import ModelConfig
from dsa_plugin.generate.cuts import Cut, check_shape, cuts, lacks, unloaded, whole_shapes
from dsa_plugin.generate.ranks import Ranks
from dsa_plugin.safetensors_header import rank_file


def plan_ranks(folder: Path, target: Path, size: int) -> Plan:
    """What is written for so many ranks. Tensors that no rank reads, as MTP layers, are left out.

    Raises:
        ValueError: the checkpoint is none that `dsa generate` runs, or not by so many ranks, or
            the target is within it.
    """
    check_apart(folder, target)
    source = open_source(folder)
    return Plan(source, target, f"mp{size}", _files(source, size), {CONFIG: source.config})


def compare_ranks(source: Path, converted: Path, size: int, workers: int) -> Iterator[Compared]:
    """Compare each part of each of `size` ranks with where it was cut from, and look for others.

    Raises:
        ValueError: the source is no whole checkpoint, or the conversion is not finished.
    """
    check_finished(converted)
    for rank, (name, outputs) in enumerate(_files(open_source(source), size).items()):
        if not (converted / name).is_file():
            yield unknown(name, "missing")
            continue
        found = read_shard(converted, name)
        yield from in_threads(partial(_compared, found, rank), outputs, workers)
        others = sorted(found.keys() - {output.name for output in outputs})
        yield from (unknown(_of_rank(other, rank), "not of this rank") for other in others)


def _files(source: Source, size: int) -> dict[str, list[Output]]:
    """Of each rank its file's name and tensors."""
    config = ModelConfig.of_folder(source.folder)
    config.check_ranks(size)
    tensors, whole = source.tensors, whole_shapes(config)
    files = {}
    for rank in range(size):
        model = unloaded(config, Ranks(rank, size, torch.device("cpu")))
        made: dict[str, Output] = {}  # of a head that is the embedding, once
        for cut in cuts(model, whole).values():
            made[cut.name] = _output(source.folder, tensors, cut)
            if made[cut.name].dtype == "F8_E4M3":
                made[cut.scales.name] = _output(source.folder, tensors, cut.scales)
        files[rank_file(rank, size)] = in_order(made.values())
    return files


def _output(folder: Path, tensors: Mapping[str, Stored], cut: Cut) -> Output:
    if cut.name not in tensors:
        raise lacks(folder, cut.name)
    stored = tensors[cut.name]
    check_shape(folder, cut.name, stored.shape, cut.whole)
    return Output(cut.name, stored.dtype, cut.shape, stored, "cut", cut.where)


def _compared(found: Mapping[str, Stored], rank: int, output: Output) -> Compared:
    part, name = found.get(output.name), _of_rank(output.name, rank)
    if part is None:
        return unknown(name, "missing")
    if part.shape != output.shape:
        return unknown(name, f"shape {list(part.shape)}")
    if part.dtype != output.dtype:
        return unknown(name, f"dtype {part.dtype}")
    return measured(name, "same", _pieces(output, part))


def _pieces(output: Output, part: Stored) -> Iterator[Piece]:
    step = rows_at_once(math.prod(output.source.shape[1:]))
    whole = (slice(None),)
    pieces = zip(
        read_cut(output.source, output.where, step), read_cut(part, whole, step), strict=True
    )
    for before, after in pieces:
        if not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
            yield before.double(), after.double(), torch.zeros(())


def _of_rank(name: str, rank: int) -> str:
    return f"{name} of rank {rank}"
