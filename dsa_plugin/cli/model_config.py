"""The model that a command names: a local folder, a registered release, or a repository."""

from __future__ import annotations

from pathlib import Path

from dsa_plugin.config_file import read_config
from dsa_plugin.planning.model import (
    ModelShape,
    find_registered,
    nearest_registered,
    registered_models,
)
from dsa_registry import why_not


def find_model(name: str) -> ModelShape:
    """The shape of a model; only its config.json is read.

    Args:
        name: a folder with a config.json; a registered release, which needs no network, such as
            zai-org/GLM-5.2 or GLM-5.2; or a repository on the Hugging Face Hub.

    Raises:
        ValueError: none of these, or its config.json is not a DSA model's.
    """
    if Path(name).is_dir():
        return _from_folder(name, Path(name))
    registered = find_registered(name)
    if registered is not None:
        return registered
    if why := why_not(name):
        raise ValueError(why)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_folder(name, download_config(name).parent)
    raise ValueError(
        f"{name!r} is no folder and no repository (organisation/name) of the Hugging Face Hub; "
        f"{_registered(name)}"
    )


def _from_folder(name: str, folder: Path) -> ModelShape:
    return ModelShape.from_config(name, read_config(folder))


def download_config(repository: str) -> Path:
    """config.json of a repository, in the Hub's cache.

    Raises:
        ValueError: it could not be had, with the reason.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    failure = None
    try:
        # Asked once: where there is no network, the download retries for half a minute.
        get_hf_file_metadata(hf_hub_url(repository, "config.json"))
    except Exception as error:  # noqa: BLE001  of requests, httpx or httpx2, as the release has it
        failure = _one_line(error)
    cached = failure is not None
    try:
        return Path(hf_hub_download(repository, "config.json", local_files_only=cached))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"config.json of {repository} could not be had from the Hugging Face Hub "
            f"({failure or _one_line(error)}); check the network and the name, set HF_TOKEN if it "
            f"is gated, or name a local folder; {_registered(repository)}"
        ) from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _registered(name: str) -> str:
    near = nearest_registered(name)
    without = f"did you mean {near}? Without" if near else "without"
    return f"{without} a network there are: {', '.join(registered_models())}"
