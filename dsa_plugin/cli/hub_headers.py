"""config.json and the headers of a repository's safetensors, by range requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsa_plugin.cli.model_config import download_config
from dsa_plugin.config_file import read_config
from dsa_plugin.safetensors_header import INDEX, read_weight_map
from dsa_plugin.verification.findings import Finding
from dsa_plugin.verification.headers import Header, Headers

_SINGLE = "model.safetensors"
_AT_ONCE = 8
Found = tuple[dict[str, Header], Finding | None]


def read_repository(
    repository: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], Headers, Mapping[str, str] | None]:
    """config.json, all headers, and the weight map of the index, if there is one.

    Args:
        repository: organisation/name on the Hugging Face Hub.
        progress: is told of files read, and how many there are.

    Raises:
        ValueError: it cannot be reached, is gated, or has no config.json or safetensors.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    config = read_config(download_config(repository).parent)
    api = HfApi()
    try:
        weight_map = None
        if api.file_exists(repository, INDEX):
            weight_map = read_weight_map(Path(hf_hub_download(repository, INDEX)).parent)
        elif not api.file_exists(repository, _SINGLE):
            raise ValueError(f"{repository} has neither {INDEX} nor {_SINGLE}; name another one")
        files = sorted(set(weight_map.values())) if weight_map else [_SINGLE]
        done, results = 0, {}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for file, result in zip(
                files, pool.map(lambda file: _header(api, repository, file), files), strict=True
            ):
                results[file] = result
                done += 1
                progress(done, len(files))
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the headers of {repository} could not be read: {' '.join(str(error).split())}; "
            "check the network, and set HF_TOKEN if it is gated"
        ) from None
    return config, _headers(results), weight_map


def _header(api: Any, repository: str, file: str) -> Found:
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    try:
        found = api.parse_safetensors_file_metadata(repository, file)
    except EntryNotFoundError:
        return {}, None  # `missing_shards` says so
    except SafetensorsParsingError as error:
        what = f"has no readable header: {' '.join(str(error).split())}"
        return {}, Finding("wrong", file, what, "take another revision or repository")
    return {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape)}
        for name, tensor in found.tensors.items()
    }, None


def _headers(results: Mapping[str, Found]) -> Headers:
    tensors: dict[str, Header] = {}
    files: dict[str, str] = {}
    for file, (header, _) in results.items():
        tensors.update(header)
        files.update(dict.fromkeys(header, file))
    faults = tuple(fault for _, fault in results.values() if fault is not None)
    return Headers(tensors, files, faults)
