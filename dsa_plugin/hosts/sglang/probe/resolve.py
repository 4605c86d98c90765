"""What SGLang makes of a command line: its parser, and its resolved arguments on a target.

`python -m dsa_plugin.hosts.sglang.probe.resolve`, as `dsa_plugin.probe.ask` runs it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any, NoReturn

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__

from dsa_plugin.hosts.sglang import register
from dsa_plugin.hosts.sglang.names import BACKEND
from dsa_plugin.hosts.sglang.probe.pretend import prepare, pretend, pretend_build
from dsa_plugin.probe.ask import Answer, Question, Target, answer, check_flags
from dsa_plugin.probe.our_kernels import our_kernels
from dsa_plugin.probe.switches import spellings

# Its fields, by name.
_SETTLED = (
    "dsa_prefill_backend",
    "dsa_decode_backend",
    "kv_cache_dtype",
    "context_length",
    "tp_size",
    "attn_dp_size",
)


def resolve(question: Question) -> Answer:
    """As `sglang.launch_server` does, up to where it starts processes.

    Raises:
        ValueError: also for a deprecated flag; the next release may lack it.
    """
    if question.target:
        pretend(question.target)
    load_plugins()
    parser: Any = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parser.error = _refuse  # its own prints all of its usage
    known = parser._option_string_actions
    check_flags(question.arguments, known, f"SGLang {__version__}")
    for argument in question.arguments:
        _refuse_deprecated(argument, known.get(argument))
    server_args = ServerArgs.from_cli_args(parser.parse_args(question.arguments))
    if question.target is None:
        return Answer(None, {"spellings": spellings(parser)})
    server_args.resolve_once()
    view = resolving_view(server_args)
    settled = {name: getattr(view, name) for name in _SETTLED}
    served_by = "dsa_plugin" if view.attention_backend == BACKEND else "sglang"
    kernels = _kernels(view, question.target) if question.kernels else {}
    return Answer(None, settled | {"served_by": served_by} | kernels)


def _kernels(view: Any, target: Target) -> dict[str, Any]:
    """What runs each op: the host's own, and ours where the host has loaded the plugin."""
    pretend_build(target)
    from dsa_plugin.hosts.sglang.probe.native import native_kernels

    native = [asdict(kernel) for kernel in native_kernels(view)]
    loaded = register.cache_info().currsize > 0
    ours = our_kernels(fp8_latents=view.kv_cache_dtype == "fp8_e4m3") if loaded else {}
    return {"native": native, "ours": ours}


def _refuse_deprecated(flag: str, action: Any) -> None:
    if type(action).__name__.startswith("Deprecated"):
        raise ValueError(f"{flag} is deprecated; use {action.new_flag}")


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


if __name__ == "__main__":
    prepare()
    answer(resolve)
