"""The command `vllm serve`, by the one name that every release has it under."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

COMMAND = ServeSubcommand()


def serve_parser() -> Any:
    """Its parser alone: `make_arg_parser` lay in openai/ until 0.28, and in common/ since 0.33."""
    return COMMAND.subparser_init(FlexibleArgumentParser().add_subparsers())
