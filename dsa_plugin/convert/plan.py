"""What a conversion will write, known before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa_plugin.convert.companions import CONFIG
from dsa_plugin.convert.formats import (
    Output,
    Precision,
    check_possible,
    converted_config,
    outputs,
)
from dsa_plugin.convert.source import Source, open_source
from dsa_plugin.fp8_weights import SCALE_SUFFIX
from dsa_plugin.safetensors_header import INDEX


@dataclass(frozen=True)
class Plan:
    """A conversion.

    to: what the weights become, as messages and the manifest say it.
    files: those of weights, each with its tensors.
    documents: JSON files to write anew, config.json the last.
    """

    source: Source
    target: Path
    to: str
    files: Mapping[str, list[Output]]
    documents: Mapping[str, Mapping[str, Any]]

    def made_from(self, name: str) -> list[str]:
        """The source's files that a file needs: those of its tensors, and of their scales."""
        tensors, read = self.source.tensors, [output.source for output in self.files[name]]
        scales = (tensors.get(weight.name + SCALE_SUFFIX) for weight in read)
        return sorted({stored.path.name for stored in (*read, *scales) if stored})

    def read_bytes(self, name: str) -> int:
        """Bytes of tensors that are read for a file, but for scales of weights that change."""
        return sum(
            output.nbytes if output.part == "cut" else output.source.nbytes
            for output in self.files[name]
            if output.part not in ("scale", "shape")
        )


def plan(folder: Path, target: Path, precision: Precision) -> Plan:
    """What a conversion of a folder's checkpoint into another folder will write.

    A file has the name of the source's that its weights are read from; one that would hold no
    tensors, since it had scales alone, is not written.

    Raises:
        ValueError: the source cannot be converted so, or the target is within it.
    """
    check_apart(folder, target)
    source = open_source(folder)
    check_possible(source, precision)
    made = {name: outputs(shard, precision) for name, shard in source.shards.items()}
    files = {name: made[name] for name in made if made[name]}
    documents = {CONFIG: converted_config(source.config, precision)}
    if (folder / INDEX).exists():
        documents = {INDEX: _index(files), **documents}
    return Plan(source, target, precision, files, documents)


def check_apart(folder: Path, target: Path) -> None:
    """Raises ValueError where the target is the source, or within it."""
    inner, outer = target.resolve(), folder.resolve()
    if inner == outer or outer in inner.parents:
        raise ValueError(f"{target} is the source or within it; name another folder to write")


def _index(files: Mapping[str, list[Output]]) -> dict[str, Any]:
    made = {output.name: name for name, outputs in files.items() for output in outputs}
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    return {"metadata": {"total_size": total}, "weight_map": made}
