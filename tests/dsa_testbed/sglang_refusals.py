"""Runs in SGLang's environment: resolves one command line after another, and says what came of it.

Each line of stdin is a JSON object {"args": [...], "env": {...}}; the answer to it on stdout is the
message of the exception that ended its resolution, or null, after "refusal: ".
"""

import argparse
import json
import os
import sys

from sglang.srt.plugins import load_plugins


def resolve(args: list[str]) -> str | None:
    """Resolve the arguments as `sglang.launch_server` does, up to where it starts processes."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    try:
        ServerArgs.from_cli_args(parser.parse_args(args)).resolve_once()
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        return str(error)
    return None


def main() -> None:
    load_plugins()
    outside = dict(os.environ)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["env"])
        message = resolve(request["args"])
        print("refusal: " + json.dumps(message), flush=True)
        for name in request["env"]:
            os.environ.pop(name)
            if name in outside:
                os.environ[name] = outside[name]


if __name__ == "__main__":
    main()
