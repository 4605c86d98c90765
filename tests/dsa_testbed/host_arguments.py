"""What a host's own parser makes of command lines, `--config` files included.

`python -P host_arguments.py HOST`, in that host's environment: stdin is a JSON list of command
lines without the program; each gives a line on stdout, after "parsed: ", with the host's arguments
by name, or with the text it refuses the command line with.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

Parsed = dict[str, Any] | str
_PREFIX = "parsed: "


def parse(python: str, host: str, lines: Sequence[Sequence[str]]) -> list[Parsed]:
    """One answer a command line, in order, of the host in the environment of `python`."""
    done = subprocess.run(
        [python, "-P", __file__, host],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    answers: list[Parsed] = [
        json.loads(line.removeprefix(_PREFIX))
        for line in done.stdout.splitlines()
        if line.startswith(_PREFIX)
    ]
    assert len(answers) == len(lines), done.stdout + done.stderr
    return answers


def vllm_parse() -> Callable[[list[str]], dict[str, Any]]:
    """As `vllm serve` does, whose parser is one of several under `vllm`."""
    parser = import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    serve = import_module("vllm.entrypoints.cli.serve").ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))

    def parse_one(line: list[str]) -> dict[str, Any]:
        arguments: dict[str, Any] = vars(parser.parse_args(["serve", *line]))
        # ServeSubcommand.cmd: the model by place wins over the file's --model.
        return arguments | {"model": arguments.pop("model_tag") or arguments["model"]}

    return parse_one


def sglang_parse() -> Callable[[list[str]], dict[str, Any]]:
    """As `sglang.launch_server` does."""
    import_module("sglang.srt.plugins").load_plugins()
    prepare = import_module("sglang.srt.server_args").prepare_server_args
    asdict = import_module("msgspec").structs.asdict
    return lambda line: asdict(prepare(line))


def main(host: str) -> None:
    parse_one = {"vllm": vllm_parse, "sglang": sglang_parse}[host]()
    for line in json.load(sys.stdin):
        answer: Parsed
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                answer = parse_one(line)
        except SystemExit:
            answer = said.getvalue()
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            answer = str(error)
        print(_PREFIX + json.dumps(answer, default=str), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
