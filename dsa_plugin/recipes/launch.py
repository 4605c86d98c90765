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

from dsa_plugin.recipes.schema import HostName, Recipe


def installed_version(host: str) -> str | None:
    """The version of a host in this environment; None where it is not installed."""
    try:
        return version(host)
    except PackageNotFoundError:
        return None


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
    wanted = Requirement(recipe.host)
    found = installed_version(wanted.name)
    if found is None:
        others = [name for name in get_args(HostName) if installed_version(name)]
        here = (
            f"; {others[0]} {installed_version(others[0])} is: `dsa recipe list` names its recipes"
            if others
            else f": pip install '{recipe.host}', in an environment of its own"
        )
        raise ValueError(f"this recipe is for {wanted.name}, which is not installed here{here}")
    if not wanted.specifier.contains(found, prereleases=True):
        raise ValueError(
            f"this recipe is for {recipe.host}; installed is {wanted.name} {found}. Install a "
            f"version in that range or a dsa-plugin that knows {found}; or copy the recipe, change "
            "its host line, and `dsa recipe check` the copy"
        )


def check_model(model: str) -> None:
    """Raises ValueError where a model is a folder and not there, or not a checkpoint's."""
    if not model.startswith((".", "/", "~")):
        return  # a Hugging Face id, which the host looks up
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ValueError(f"the model's folder {model} does not exist; name it with --model FOLDER")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model} has no config.json, so it is not a checkpoint's folder")


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
