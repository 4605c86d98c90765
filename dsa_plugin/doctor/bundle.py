"""What a bug report needs, in one JSON file: `dsa doctor --bundle`.

Each section is made on its own: one that cannot be says why, and the others are there. All of it
goes through `redact` at the end, whatever a section has taken out itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsa_plugin.doctor.checkpoint import config_numbers, decisions, files
from dsa_plugin.doctor.command_line import examine_command, split_command
from dsa_plugin.doctor.features import load_features
from dsa_plugin.doctor.findings import examine_device, examine_environment
from dsa_plugin.doctor.log_tail import log_tail
from dsa_plugin.doctor.machine import gpus, machine, versions
from dsa_plugin.doctor.redact import Redactor
from dsa_plugin.doctor.self_probe import kernels
from dsa_plugin.doctor.serving import MODEL_FLAG
from dsa_plugin.env import OP_COUNTS, VARIABLES, Env
from dsa_plugin.probe.ask import Target
from dsa_plugin.probe.switches import written
from dsa_plugin.recipes.launch import installed_version
from dsa_plugin.recipes.schema import HostName

FORMAT = 1
_HOSTS: tuple[HostName, ...] = ("vllm", "sglang")
# Of libraries below the hosts, whose own variables are listed in features.yaml.
_PREFIXES = (
    *("CUDA_", "FLASHINFER_", "GLOO_", "HF_HUB_", "HIP_", "HSA_", "KMP_", "MKL_", "NCCL_"),
    *("NVIDIA_", "OMP_", "PYTHONPATH", "PYTORCH_", "RAY_", "RCCL_", "ROCR_", "SGLANG_", "TORCH"),
    *("TRANSFORMERS_", "TRITON_", "VLLM_"),
)


@dataclass(frozen=True)
class Asked:
    """What a bundle is made of.

    Attributes:
        command: the words that start a host, variables before them; empty: none was given.
        model: a folder, or a name that is none.
        log: of a server.
    """

    command: Sequence[str] = ()
    model: str | None = None
    log: Path | None = None


def make_bundle(asked: Asked, environ: Mapping[str, str]) -> dict[str, Any]:
    """All sections, redacted.

    Raises:
        ValueError: the command starts neither host.
        OSError: the log cannot be read.
    """
    host, arguments, variables = split_command(asked.command) if asked.command else (None, [], {})
    environ = {**environ, **variables}
    redactor = Redactor(environ)
    # First: what is secret in a flag is then taken out of all that follows.
    for flag in written(arguments, {}):
        redactor.value(flag.name, " ".join(flag.values))
    log = log_tail(asked.log) if asked.log else None
    sections: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "machine": machine,
        "gpus": gpus,
        "findings": _findings,
        "settings": lambda: settings(environ),
        "environment": lambda: _environment(redactor, host, environ),
        "kernels": lambda: kernels(environ),
    }
    if asked.command:
        sections["command"] = lambda: asdict(
            examine_command(asked.command, Target.here()).redacted(redactor)
        )
    if folder := _model_folder(asked.model, arguments):
        sections["model"] = lambda: _model(folder, environ)
    if path := environ.get(OP_COUNTS.name):
        sections["op_counts"] = lambda: op_counts(Path(path))
    if log is not None:
        sections["log"] = lambda: redactor.text(log).splitlines()
    made = {"dsa_bundle": FORMAT, "made": datetime.now(UTC).isoformat(timespec="seconds")}
    return made | {name: redactor.texts(_attempt(make)) for name, make in sections.items()}


def check_writable(path: Path) -> None:
    """Before a minute's work.

    Raises:
        OSError: no file can be written there.
    """
    try:
        path.open("a").close()
    except OSError as error:
        raise OSError(
            f"--bundle {path} cannot be written ({error.strerror}); name a file in a folder that "
            "is there and that you may write to"
        ) from None


def write_bundle(bundle: Mapping[str, Any], path: Path) -> int:
    """Write it; the bytes that it takes."""
    text = json.dumps(bundle, indent=1, ensure_ascii=False, default=str) + "\n"
    path.write_text(text, encoding="utf-8")
    return path.stat().st_size


def op_counts(path: Path) -> dict[str, int]:
    """Calls of each op so far, over all processes that keep them under this path."""
    total: Counter[str] = Counter()
    for file in path.parent.glob(f"{path.name}.*"):
        for line in file.read_text().splitlines():
            name, count = line.split()
            total[name] += int(count)
    return dict(total)


def settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """Every DSA_* variable: its text, or its default; and what is wrong with them."""
    found: dict[str, Any] = {
        variable.name: environ.get(variable.name, f"{variable.default} (default)")
        for variable in VARIABLES
    }
    try:
        Env.load(environ)
    except ValueError as error:
        found["error"] = str(error)
    return found


def _attempt(section: Callable[[], Any]) -> Any:
    try:
        return section()
    except Exception as error:  # noqa: BLE001  the other sections are worth having
        return {"error": f"{type(error).__name__}: {error}"}


def _installed() -> tuple[HostName, ...]:
    return tuple(name for name in _HOSTS if installed_version(name))


def _findings() -> list[dict[str, Any]]:
    found = [finding for name in _installed() for finding in examine_environment(name)]
    return [asdict(finding) for finding in (*found, *examine_device())]


def _environment(
    redactor: Redactor, host: HostName | None, environ: Mapping[str, str]
) -> list[dict[str, str]]:
    """The variables that a host or a library below it reads, each with what becomes of it."""
    hosts = (host,) if host else _installed() or _HOSTS
    listed = {name: f for each in hosts for f in load_features(each).variables for name in [f.name]}
    ours = {variable.name for variable in VARIABLES}
    found = []
    for name, value in sorted(environ.items()):
        if name in ours or not (name in listed or name.startswith(_PREFIXES)):
            continue
        feature = listed.get(name)
        known = {"classed": feature.classed, "reason": feature.reason} if feature else {}
        found.append({"name": name, "value": redactor.value(name, value), **known})
    return found


def _model_folder(named: str | None, arguments: Sequence[str]) -> Path | None:
    """The one that was named, or that the command serves, where it is a folder here."""
    given = [*arguments[:1]] if arguments and not arguments[0].startswith("-") else []
    flags = [flag for flag in written(arguments, {}) if flag.name in MODEL_FLAG.values()]
    given += [flag.values[0] for flag in flags if flag.values]
    return next((Path(name) for name in [named, *given] if name and Path(name).is_dir()), None)


def _model(folder: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "config": config_numbers(config),
        "decisions": _attempt(lambda: decisions(config, Env.load(environ))),
        "files": _attempt(lambda: files(folder)),
    }
