"""A host whose next release has a flag and a variable more.

`python -m dsa_testbed.new_switch ... dsa_plugin.hosts.HOST.probe.switches`, for `read_switches`
instead of the latter alone: the host's own parser and table are given them in its process.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

FLAG, HELP, VARIABLE = "--fake-attention", "Attend to fakes.", "FAKE_ATTENTION"


def grow_vllm() -> None:
    """To the argument parser that `vllm serve` makes, and to vllm.envs."""
    command: Any = import_module("dsa_plugin.hosts.vllm.probe.command").COMMAND
    make = command.subparser_init

    def with_flag(subparsers: Any) -> Any:
        parser = make(subparsers)
        parser.add_argument(FLAG, help=HELP)
        return parser

    command.subparser_init = with_flag
    import_module("vllm.envs").environment_variables[VARIABLE] = lambda: None


def grow_sglang() -> None:
    """To the argument parser that the server fills, and to its class of variables."""
    server_args: Any = import_module("sglang.srt.server_args").ServerArgs
    add = server_args.add_cli_args

    def with_flag(parser: Any) -> None:
        add(parser)
        parser.add_argument(FLAG, help=HELP)

    server_args.add_cli_args = staticmethod(with_flag)
    environ: Any = import_module("sglang.srt.environ")
    setattr(type(environ.envs), VARIABLE, environ.EnvBool(False))


def main() -> None:
    module = sys.argv[-1]
    {"vllm": grow_vllm, "sglang": grow_sglang}[module.split(".")[2]]()
    import_module(module).main()


if __name__ == "__main__":
    main()
