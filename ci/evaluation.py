"""Evaluate a checkpoint by every way of serving it, and write what came out into the document."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dsa_plugin.cli.evaluate_figure import draw
from dsa_plugin.cli.evaluate_tables import markdown
from dsa_plugin.evaluation.results import Results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "evaluation"
DOCUMENT, FIGURE = ROOT / "docs" / "evaluation.md", ROOT / "docs" / "evaluation.png"
START, END = "<!-- Written by ci/evaluation -->\n", "<!-- until here -->\n"
REFERENCE = "transformers"
SERVERS = ("vllm", "sglang")
# 210 questions a variant.
ASKED = ("--lengths", "1024,1536,2048,4096,8192,16384", "--questions", "5", "--dtype", "float32")


def evaluate(checkpoint: str) -> None:
    """Fill the folder; the hosts' answers are compared with the reference's.

    Raises:
        subprocess.CalledProcessError: a run failed, or the answers differ.
    """
    RESULTS.mkdir(exist_ok=True)
    reference = RESULTS / f"{REFERENCE}.json"
    _run(sys.executable, checkpoint, REFERENCE)
    sglang = Path(os.environ.get("DSA_TEST_SGLANG", ROOT / ".venv" / "sglang"))
    pythons = {"vllm": sys.executable, "sglang": str(sglang / "bin" / "python")}
    for host in SERVERS:
        _run(pythons[host], checkpoint, host, "--variants", "dsa", "--same-as", str(reference))


def _run(python: str, checkpoint: str, through: str, *args: str) -> None:
    out = str(RESULTS / f"{through}.json")
    command = [python, "-m", "dsa_plugin.cli", "eval", checkpoint, "--through", through]
    # On a CPU vLLM asks for nearly all memory unless this says how much caches take, in GiB.
    env = {"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ
    subprocess.run([*command, *ASKED, "--out", out, "--resume", *args], check=True, env=env)


def section() -> str:
    """The tables of every file of results."""
    files = [RESULTS / f"{name}.json" for name in (REFERENCE, *SERVERS)]
    found = [Results.load(file) for file in files if file.exists()]
    if not found:
        return "No results are kept here yet.\n"
    blocks = []
    for results in found:
        setting = results.setting
        seconds = sum(cell.seconds for cell in results.cells)
        blocks.append(f"Through {setting.through}, {setting.dtype}, {seconds / 60:.0f} minutes:\n")
        blocks.append(markdown(results))
        if setting.through == REFERENCE:
            blocks.append("![recall by length and depth](evaluation.png)\n")
    return "\n".join(blocks)


def with_section(document: str) -> str:
    """The document with its tables replaced."""
    before, _, rest = document.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{section()}{END}{after}"


def main() -> None:
    if sys.argv[1:]:
        evaluate(sys.argv[1])
    DOCUMENT.write_text(with_section(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    reference = RESULTS / f"{REFERENCE}.json"
    if reference.exists():
        draw(Results.load(reference), FIGURE)


if __name__ == "__main__":
    main()
