"""What lies beside a checkpoint's weights: tokenizer and all else copied, config and index made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsa_plugin.convert.atomic import whole_file
from dsa_plugin.convert.manifest import MANIFEST
from dsa_plugin.convert.source import Source
from dsa_plugin.safetensors_header import INDEX

CONFIG = "config.json"
_MADE = {CONFIG, INDEX, MANIFEST}
_WEIGHTS = {
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors",
}  # fmt: skip


def companions(source: Source) -> tuple[list[str], list[str]]:
    """Names, in the source's folder, of the files to copy, and of other weights, left out."""
    copied: list[str] = []
    left_out: list[str] = []
    for name in sorted(_visible_files(source.folder)):
        if name in _MADE or name in source.shards:
            continue
        weights = Path(name).suffix in _WEIGHTS or name.endswith(".safetensors.index.json")
        (left_out if weights else copied).append(name)
    return copied, left_out


def write_companions(
    source: Source, target: Path, documents: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Write what is not weights, and return its names.

    The documents come last, in their order: without config.json no host takes the folder for a
    checkpoint.
    """
    written, _ = companions(source)
    for name in written:
        with (source.folder / name).open("rb") as old, whole_file(target / name) as new:
            shutil.copyfileobj(old, new)
    for name, document in documents.items():
        with whole_file(target / name) as file:
            file.write((json.dumps(document, indent=2) + "\n").encode())
    return [*written, *documents]


def _visible_files(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield str((Path(parent) / name).relative_to(folder))
