"""Every switch of the vLLM installed here: of `vllm serve`, of its JSON flags, and of vllm.envs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from vllm import __version__, config, envs

from dsa_plugin.hosts.vllm.probe.command import serve_parser
from dsa_plugin.probe.switches import Switch, flags_of, write

# Flags that take an object, and its class; their other fields concern other models.
_OBJECTS = {
    "attention": "AttentionConfig",
    "compilation": "CompilationConfig",
    "eplb": "EPLBConfig",
    "kernel": "KernelConfig",
    "kv-transfer": "KVTransferConfig",
    "speculative": "SpeculativeConfig",
}
_NESTED = {"compilation": ("pass_config", "PassConfig")}


def _fields() -> Iterator[Switch]:
    for flag, name in _OBJECTS.items():
        yield from _of_class(f"--{flag}-config", getattr(config, name, None))
    for flag, (field, name) in _NESTED.items():
        yield from _of_class(f"--{flag}-config.{field}", getattr(config, name, None))


def _of_class(flag: str, cls: Any) -> Iterator[Switch]:
    for field in fields(cls) if is_dataclass(cls) else ():
        if field.init and not field.name.startswith("_"):
            yield Switch(f"{flag}.{field.name}")


def main() -> None:
    """Print them."""
    flags = [*flags_of(serve_parser()), *_fields()]
    write(__version__, flags, (Switch(name) for name in envs.environment_variables))


if __name__ == "__main__":
    main()
