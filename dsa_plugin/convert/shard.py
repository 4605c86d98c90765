"""One file of a converted checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsa_plugin.convert.atomic import whole_file
from dsa_plugin.convert.formats import Output
from dsa_plugin.convert.numbers import quantise
from dsa_plugin.convert.rows import read_bytes, read_cut, read_rows, rows_at_once
from dsa_plugin.convert.source import TORCH_DTYPES, Stored
from dsa_plugin.fp8_weights import SCALE_SUFFIX

Progress = Callable[[int], None]
"""Told the bytes read since it was last called; what it raises ends the work."""


def file_bytes(outputs: Sequence[Output]) -> int:
    """Size of the file that holds these tensors."""
    return len(_header(outputs)) + sum(output.nbytes for output in outputs)


def write_shard(
    path: Path,
    outputs: Sequence[Output],
    tensors: Mapping[str, Stored],
    progress: Progress,
) -> str:
    """Write a file and return its sha256.

    Args:
        path: of the file.
        outputs: its tensors, in the order of their data.
        tensors: the whole source's by name: a scale may lie in another file than its weight.
        progress: told of the bytes as they are read.

    Raises:
        ValueError: a weight that is to be quantised holds an infinity or NaN.
        OSError: as the disk has it.
    """
    digest = hashlib.sha256()
    with whole_file(path) as file:
        for data in _pieces(outputs, tensors, progress):
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _header(outputs: Sequence[Output]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        begin, end = end, end + output.nbytes
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": output.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(
    outputs: Sequence[Output], tensors: Mapping[str, Stored], progress: Progress
) -> Iterator[bytes | bytearray | memoryview]:
    """The file's bytes. Of packed weights the scales are kept until their turn, 2 bytes each."""
    scales: dict[str, list[Tensor]] = {}
    yield _header(outputs)
    for output in outputs:
        weight = output.source
        if output.part == "copy":
            for data in read_bytes(weight):
                yield data
                progress(len(data))
        elif output.part == "cut":
            step = rows_at_once(math.prod(weight.shape[1:]))
            for values in read_cut(weight, output.where, step):
                yield _bytes(values)
                progress(values.nbytes)
        elif output.part == "shape":
            yield _bytes(torch.tensor(weight.shape))
        elif output.part == "scale":
            yield from map(_bytes, scales.pop(weight.name))
        else:
            kept = scales.setdefault(weight.name, [])
            for values in read_rows(weight, tensors.get(weight.name + SCALE_SUFFIX)):
                yield _bytes(_converted(values, output, kept))
                progress(values.numel() * TORCH_DTYPES[weight.dtype].itemsize)


def _converted(values: Tensor, output: Output, scales: list[Tensor]) -> Tensor:
    if output.part == "bf16":
        return values.bfloat16()
    packed, scale = quantise(values, output.shape[1] * 32 // values.shape[1])
    if not scale.isfinite().all():
        raise ValueError(
            f"{output.source.name} of {output.source.path} holds an infinity or NaN, which no "
            "integer is. Download it again; bf16 is possible"
        )
    scales.append(scale)
    return packed


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
