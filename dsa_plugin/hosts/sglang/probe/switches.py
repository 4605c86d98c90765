"""Every switch of the SGLang installed here: of its server, and of its environ module."""

from __future__ import annotations

import argparse

from sglang.srt import environ
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__

from dsa_plugin.probe.switches import Switch, flags_of, write


def main() -> None:
    """Print them."""
    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    fields = vars(type(environ.envs)).items()
    names = [name for name, field in fields if isinstance(field, environ.EnvField)]
    write(__version__, flags_of(parser), map(Switch, names))


if __name__ == "__main__":
    main()
