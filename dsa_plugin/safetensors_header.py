"""What safetensors files hold, by their names, headers and index alone."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
_RANK_FILE = re.compile(r"model\d+-mp(\d+)\.safetensors")


def rank_file(rank: int, size: int) -> str:
    """Name of one rank's weights among `size`, as DeepSeek's inference demo has it."""
    return f"model{rank}-mp{size}.safetensors"


def ranks_of(folder: Path) -> int | None:
    """For how many ranks a folder's weights are cut; None where they are whole.

    Raises:
        ValueError: for several numbers.
    """
    names = (path.name for path in folder.glob("model*-mp*.safetensors"))
    sizes = {int(found[1]) for name in names if (found := _RANK_FILE.fullmatch(name))}
    if len(sizes) > 1:
        raise ValueError(
            f"{folder} has weights cut for {', '.join(map(str, sorted(sizes)))} ranks; keep one of "
            "them in a folder"
        )
    return sizes.pop() if sizes else None


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes in a safetensors file, after checking that the file is whole.

    Raises:
        ValueError: the file is shorter or longer than its header says, or has no readable header.
    """
    return read_layout(path)[0]


def read_layout(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """read_header()'s tensors, and the byte of the file from which their data_offsets count.

    Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
    (huggingface/safetensors, README "Format").
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
        text = file.read(length)
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} has a damaged header ({error!r}). Download it again.") from None
    expected = 8 + length + end
    if size != expected:
        raise ValueError(
            f"{path} holds {size} bytes where its header promises {expected}: it is truncated or "
            "damaged. Download it again."
        )
    return header, 8 + length


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file of the folder, by its index; None without one.

    Raises:
        ValueError: it is no index, or names files elsewhere.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Download it again.") from None
    if not isinstance(index, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in index.values()
    ):
        raise ValueError(f"{path} names no files of this folder. Download it again.")
    return index
