"""What a conversion will write, known before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsa_plugin.convert.formats import Output, Precision, check_possible, outputs
from dsa_plugin.convert.source import SCALE_SUFFIX, Source, open_source


@dataclass(frozen=True)
class Plan:
    """A conversion's files of weights, each with its tensors.

    A file has the name of the source's that its weights are read from; one that would hold no
    tensors, since it had scales alone, is not written.
    """

    source: Source
    target: Path
    precision: Precision
    files: Mapping[str, list[Output]]

    def made_from(self, name: str) -> list[str]:
        """The source's files that a file needs: its own, and those of its weights' scales."""
        tensors = self.source.tensors
        scales = (tensors.get(output.source.name + SCALE_SUFFIX) for output in self.files[name])
        return sorted({name, *(scale.path.name for scale in scales if scale)})

    def read_bytes(self, name: str) -> int:
        """Bytes of tensors that are read for a file, but for scales."""
        return sum(o.source.nbytes for o in self.files[name] if o.part not in ("scale", "shape"))


def plan(folder: Path, target: Path, precision: Precision) -> Plan:
    """What a conversion of a folder's checkpoint into another folder will write.

    Raises:
        ValueError: the source cannot be converted so, or the target is within it.
    """
    inner, outer = target.resolve(), folder.resolve()
    if inner == outer or outer in inner.parents:
        raise ValueError(f"{target} is the source or within it; name another folder to write")
    source = open_source(folder)
    check_possible(source, precision)
    made = {name: outputs(shard, precision) for name, shard in source.shards.items()}
    return Plan(source, target, precision, {name: made[name] for name in made if made[name]})
