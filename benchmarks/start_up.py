"""What the plugin adds to a start: imports, `dsa --help`, and the load of plugins in each host.

    PYTHONPATH=tests .venv/vllm/bin/python benchmarks/start_up.py [--runs 5]

Each row is a median of processor seconds (user and system), which other processes on the machine
change little; the rows take turns. A host's rows are of children of a process that has imported it,
each of which loads plugins once, as every process of a server does at its start.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence

from dsa_testbed.sglang_server import sglang_python

_PROGRAMS = {
    "python": "pass",
    "import dsa_plugin": "import dsa_plugin",
    "import dsa_plugin.hosts.vllm": "import dsa_plugin.hosts.vllm",
    "dsa --help": "from dsa_plugin.cli import app; app(['--help'])",
}
_CHILDREN = """
import json, os, sys, time
{before}

def seconds(**env):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.environ.update(env)
        began = time.process_time()
        load()
        os.write(writing, json.dumps(time.process_time() - began).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(reading, 99))

pairs = [(seconds({variable}="none"), seconds(DSA_PLUGIN="on")) for _ in range({runs})]
print(json.dumps(pairs))
"""
_VLLM = "import vllm.engine.arg_utils; from vllm.plugins import load_general_plugins as load"
_SGLANG = "import sglang.srt.server_args; from sglang.srt.plugins import load_plugins as load"


def of_program(code: str) -> float:
    """Processor seconds of a Python process that runs this."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def of_host(python: str, before: str, variable: str, runs: int) -> list[list[float]]:
    """Processor seconds in which a host loads plugins: without ours and with it, in turn."""
    code = _CHILDREN.replace("{before}", before).replace("{variable}", variable)
    done = subprocess.run(
        [python, "-c", code.replace("{runs}", str(runs))],
        check=True,
        capture_output=True,
        text=True,
    )
    pairs: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return pairs


def row(name: str, values: Iterable[float]) -> str:
    """Of a table: median, least and most, in ms."""
    taken = [1000 * value for value in values]
    return f"| {name} | {statistics.median(taken):.0f} | {min(taken):.0f} | {max(taken):.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args(arguments).runs
    taken: dict[str, list[float]] = {name: [] for name in _PROGRAMS}
    for _ in range(runs):
        for name, code in _PROGRAMS.items():
            taken[name].append(of_program(code))
    hosts = {"vLLM": (sys.executable, _VLLM, "VLLM_PLUGINS")}
    hosts["SGLang"] = (str(sglang_python()), _SGLANG, "SGLANG_PLUGINS")
    for host, how in hosts.items():
        without, with_ours = zip(*of_host(*how, runs), strict=True)
        taken[f"{host} loads plugins, none"] = list(without)
        taken[f"{host} loads plugins, ours"] = list(with_ours)
    print("| processor ms | median | least | most |\n|---|---|---|---|")
    print("\n".join(row(name, values) for name, values in taken.items()))


if __name__ == "__main__":
    main()
