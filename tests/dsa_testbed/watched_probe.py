"""A host's probe that also says which of the host's compiled files it loads.

`python -m dsa_testbed.watched_probe ... dsa_plugin.hosts.HOST.probe.resolve`, for `ask` instead of
the latter alone. Each question imports one such file more at its end, so that a watch which sees
nothing is found out.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsa_plugin.probe.ask import Answer, Question, answer

# Nothing that the probes import needs it.
PLANTED = {"vllm": "vllm.fs_io_C", "sglang": "sglang.srt.mem_cache.rust_tree_core.mem_cache"}


def main() -> None:
    module = sys.argv[-1]
    host = module.split(".")[2]
    specs = (find_spec(host), find_spec("sgl_kernel"))
    folders = [Path(spec.origin).parent for spec in specs if spec and spec.origin]
    loaded: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        # Raised before the library is opened; a module that then fails has loaded it all the same.
        file = {"import": args[1:2], "ctypes.dlopen": args[:1]}.get(event)
        if file and file[0] and any(Path(file[0]).is_relative_to(folder) for folder in folders):
            loaded.append(Path(file[0]).name)

    sys.addaudithook(watch)
    probe = import_module(module)
    probe.prepare()
    before = loaded.copy()

    def resolve(question: Question) -> Answer:
        loaded.clear()
        found: Answer = probe.resolve(question)
        import_module(PLANTED[host])
        return Answer(found.error, {"before": before, "loaded": loaded})

    answer(resolve)


if __name__ == "__main__":
    main()
