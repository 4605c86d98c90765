"""Start a recipe's server here: what is checked first, and the program and its environment."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

from packaging.requirements import Requirement

from dsa_plugin.planning.gpus import GPUS
from dsa_plugin.recipes.schema import HostName, Recipe


def installed_version(host: str) -> str | None:
    """The version of a host in this environment; None where it is not installed."""
    try:
        return version(host)
    except PackageNotFoundError:
        return None


def takes_version(recipe: Recipe, version: str | None) -> bool:
    """Whether the recipe is for this version of its host."""
    specifier = Requirement(recipe.host).specifier
    return version is not None and specifier.contains(version, prereleases=True)


def host_here(named: str | None) -> HostName:
    """The host that is meant: the one named, which need not be installed, or the one that is.

    Raises:
        ValueError: no such host, or none is installed here.
    """
    hosts = get_args(HostName)
    if named is not None and named not in hosts:
        raise ValueError(f"--host {named}; allowed: {', '.join(hosts)}")
    found: list[HostName] = [h for h in hosts if h == named or (not named and installed_version(h))]
    if not found:
        raise ValueError(
            f"neither {' nor '.join(hosts)} is installed in {sys.prefix}: run dsa in the "
            "environment of one of them, or install one"
        )
    return found[0]


def check_host(recipe: Recipe) -> None:
    """Raises ValueError unless the recipe's host is installed here in a version that it is for."""
    host = recipe.host_name
    found = installed_version(host)
    if found is None:
        raise ValueError(f"this recipe is for {host}, which is not installed here{_remedy(recipe)}")
    if not takes_version(recipe, found):
        raise ValueError(
            f"this recipe is for {recipe.host}; installed is {host} {found}. Install a version in "
            f"that range or a dsa-plugin that knows {found}; or copy the recipe, change its host "
            "line, and `dsa recipe check` the copy"
        )


def _remedy(recipe: Recipe) -> str:
    host = recipe.host_name
    if recipe.hardware.gpu == "cpu":
        install = f"`make {host}` in a clone makes an environment with its CPU build"
    else:
        install = f"pip install '{recipe.host}' in an environment of its own"
    for other in get_args(HostName):
        if version := installed_version(other):
            return f"; {other} {version} is: `dsa recipe list` names its recipes; or {install}"
    return f"; {install}"


def check_gpus(recipe: Recipe) -> str | None:
    """What to tell where this machine's GPUs are fewer or others: the flags may be adapted to them.

    Raises:
        ValueError: the recipe is for GPUs, and torch finds none.
    """
    machine = recipe.hardware
    if machine.gpu == "cpu":
        return None
    import torch

    wanted = f"this recipe is for {machine.count} x {machine.gpu} on each node"
    count = torch.cuda.device_count()
    if not count:
        raise ValueError(
            f"{wanted}, and torch {torch.__version__} finds no GPU here; run it on a machine that "
            "has them, or try demo/vllm-cpu or demo/sglang-cpu, which need none"
        )
    found = torch.cuda.get_device_name()
    if count < machine.count or GPUS[machine.gpu].device not in found:
        return f"{wanted}; here are {count} x {found}"
    return None


def check_model(model: str) -> None:
    """Raises ValueError where a model is no checkpoint's folder and cannot be a Hugging Face id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{model} has no config.json, so it is not a checkpoint's folder; name one with "
                "--model FOLDER"
            )
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"the model's folder {model} does not exist; name a checkpoint's with --model FOLDER, "
            "or a repository of the Hugging Face Hub as organisation/name"
        )


def effective(command: Sequence[str], env: Mapping[str, str]) -> str:
    """What is run, as a shell would take it."""
    assignments = [f"{name}={value}" for name, value in env.items()]
    return shlex.join([*assignments, *command])


def environment(recipe: Recipe) -> dict[str, str]:
    """The recipe's variables as they will be: the user's own values win."""
    return {name: os.environ.get(name, value) for name, value in recipe.env.items()}


def replace_process(command: Sequence[str], env: Mapping[str, str]) -> None:
    """Become the host: signals, terminal and exit code are then its own.

    Raises:
        FileNotFoundError: the host's program is not beside this interpreter.
    """
    program = sys.executable if command[0] == "python" else _beside_interpreter(command[0])
    os.execve(program, [program, *command[1:]], {**os.environ, **env})


def _beside_interpreter(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: reinstall {name} in this environment")
    return str(path)
