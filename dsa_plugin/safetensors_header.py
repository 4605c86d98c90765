"""What a safetensors file holds, by its header alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes in a safetensors file, after checking that the file is whole.

    Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
    (huggingface/safetensors, README "Format").

    Raises:
        ValueError: the file is shorter or longer than its header says, or has no readable header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ValueError(
                f"{path} ({size} bytes) is not a whole safetensors file: its header is cut off or "
                "damaged. Download it again."
            )
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    expected = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if size != expected:
        raise ValueError(
            f"{path} holds {size} bytes where its header promises {expected}: it is truncated or "
            "damaged. Download it again."
        )
    return header
