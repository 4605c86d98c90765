"""Write dsa_plugin/planning/h100.json: what `dsa plan` knows of an H100, from benchmarks/results.

    ci/measured PYTHON            # after a new file of results, or another launch configuration
    ci/measured PYTHON --check    # fail if the file is not what this would write

A result is either a sweep of launch configurations, of which the one counts that the plugin
launches now, or what benchmarks/kernels.py wrote. Of a case measured twice the later one counts. A
sweep's case has its name, FLOPs and bytes, `default`, what was launched when it ran, and as rows
the configurations: `variant`, which is "default" or blocks, warps and stages, and `us`. Where
Triton's version decides what is launched, the file's counts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsa_kernels.arch import ARCHS
from dsa_kernels.indexer_logits.kernel import paged_programs_per_sm
from dsa_kernels.launch import launch_config
from dsa_kernels.sparse_mla.kernel import shape_key
from dsa_plugin.planning.forms import read_form
from dsa_plugin.planning.measured import SHIPPED
from dsa_plugin.planning.sizes import LATENT_BYTES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ARCH, DEVICE = ARCHS["sm90"], "H100"
Row = dict[str, Any]
_SWEPT_PROGRAMS = 8  # an SM, of a decode's index scores whose variant names no other


class Former(NamedTuple):
    """Why a result is not of the present kernel, and so no more than an estimate.

    Attributes:
        why: what was different.
        variant: of the rows, the likest to what is launched now; "": the one of that name.
    """

    why: str
    variant: str = ""


# By file, and how its cases begin.
FORMER = {
    "h100-sweep.json": {
        "topk": Former("searched by bits, a long row in rounds of 16K keys", "default"),
        "masked": Former("made its mask by a histogram"),
        "sparse decode": Former("divided rows otherwise, with another merge"),
        "write latent": Former("a launch of latents alone", " w1 s1"),
    },
}


def shipped(folder: Path = RESULTS) -> tuple[str, list[str]]:
    """The file's text, and the cases that were left out, each with why.

    Raises:
        ValueError: no file there is of that GPU.
    """
    results = [
        (content, path.name)
        for path in sorted(folder.glob("*.json"))
        if DEVICE in _device(content := _read(path))
    ]
    if not results:
        raise ValueError(f"{folder} has no result of an {DEVICE}")
    results.sort(key=lambda result: result[0]["date"])
    rows: dict[tuple[str, str], Row] = {}
    left_out: list[str] = []
    for content, name in results:
        for row in _sweep(content, name, left_out) if "cases" in content else _benchmark(content):
            provenance = {"date": content["date"][:10], "triton": _triton(content), "source": name}
            rows[row["op"], row["case"]] = row | provenance
    rooflines = [content["roofline"] for content, _ in results if "roofline" in content]
    head = {
        "device": _device(results[-1][0]),
        "date": results[-1][0]["date"][:10],
        "roofline": _roofline(rooflines[-1]),
    }
    for row in rows.values():
        peak = head["roofline"]["fp8_flops" if row["precision"] == "fp8" else "flops"]
        least = max(row["flops"] / peak, row["bytes"] / head["roofline"]["bandwidth"])
        row["roofline_fraction"] = round(1e6 * least / row["us"], 4)
    lines = ",\n".join(f"  {json.dumps(rows[key])}" for key in sorted(rows))
    text = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{text},\n "rows": [\n{lines}\n ]\n}}\n', left_out


def _read(path: Path) -> dict[str, Any]:
    """A file of results; of several benchmarks in one, the kernels'."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    part: dict[str, Any] = content.get("kernels", content)
    return part


def _device(content: dict[str, Any]) -> str:
    return str(content.get("device", content.get("gpu", "")))


def _triton(content: dict[str, Any]) -> str:
    return str(content.get("triton") or content["versions"]["triton"])


def _roofline(measured: dict[str, float]) -> dict[str, float]:
    flops = measured.get("flops", measured.get("bf16", 0.0))
    fp8 = measured.get("fp8_flops", measured.get("fp8", flops))
    return {"bandwidth": measured["bandwidth"], "flops": flops, "fp8_flops": fp8}


def _sweep(content: dict[str, Any], file: str, left_out: list[str]) -> Iterator[Row]:
    """A row of each case whose present launch configuration was measured."""
    for case in content["cases"]:
        found = _case(case["case"], _triton(content))
        if found is None:
            left_out.append(f"{case['case']}: plans have no such op")
            continue
        op, name, key = found
        former = _former(file, case["case"])
        launched = (former and former.variant) or _tag(*key, _triton(content))
        times = {row["variant"]: row["us"] for row in case["rows"]}
        ran = case.get("default", launched)
        us = times.get("default" if ran == launched else launched)
        if us is None:
            left_out.append(f"{case['case']}: {launched or 'what is launched'} was not measured")
            continue
        config = ran if launched == "default" else launched
        row = _row(op, name, us, case["flops"], case["bytes"]) | {"config": config}
        yield row | ({"former": former.why} if former else {})


def _former(file: str, case: str) -> Former | None:
    """Whether a case is of a kernel that is no more."""
    begins = FORMER.get(file, {})
    return next((former for begin, former in begins.items() if case.startswith(begin)), None)


def _benchmark(content: dict[str, Any]) -> Iterator[Row]:
    """The rows of benchmarks/kernels.py that have a time."""
    for row in content["rows"]:
        if "us" in row:
            yield _row(row["op"], row["case"], row["us"], row["flops"], row["bytes"])


def _row(op: str, name: str, us: float, flops: int, nbytes: int) -> Row:
    name = name.removeprefix(f"{op} ")
    op, form = read_form(op, name)
    keys = re.match(r"prefill (\d+)K", name)
    if op == "sparse_mla" and keys:  # rows of one request share its latents
        latent = LATENT_BYTES["bf16" if name.endswith("bf16") else "fp8"]
        nbytes = min(nbytes, int(keys[1]) * 1024 * latent)
    fp8 = op == "indexer_logits" and "fp8" in form
    return {
        "op": op,
        "case": name,
        "us": round(us, 2),
        "flops": flops,
        "bytes": nbytes,
        "precision": "fp8" if fp8 else "bf16",
    }


def _case(sweep: str, triton: str) -> tuple[str, str, tuple[str, Hashable]] | None:
    """A sweep's case: op, the name that benchmarks/kernels.py would use, op and key in tuning."""
    kind, which, *_ = words = sweep.split()
    found = (re.search(unit, sweep) for unit in (r"(\d+)r\b", r"(\d+)K\b", r"h(\d+)"))
    rows, keys, heads = (int(number[1]) if number else 0 for number in found)
    where = f"{which} {keys}K, {rows} rows"
    if kind == "sparse":
        dtype = words[-1]
        wide = launch_config("sparse_mla", ARCH, ("float", 64), triton)
        key = shape_key(rows, heads, 2048, dtype == "fp8", ARCH, wide)
        return "sparse_mla", f"{where}, {heads} heads, {dtype}", ("sparse_mla", key)
    if kind == "masked":
        width = int(words[-1])
        name = f"prefill {keys}K, {rows} rows, {heads} heads" + " of 256" * (width == 256)
        return "masked_mha", name, ("sparse_mla", ("masked", width))
    if kind == "logits":
        stage = "decode" if which == "paged" else which
        name = f"{stage} {keys}K, {rows} rows, {heads} heads, fp8"
        return "indexer_logits", name, ("indexer_logits", (which, 8, 64 if heads > 32 else 32))
    if kind == "topk":
        name = f"{where}, k 2048" + ", slots" * ("slots" in words)
        return "topk_select", name, ("topk_select", "select")
    if kind == "gather":
        op, tuned = {
            "latent": ("gather_latents", "sparse_mla"),
            "index": ("gather_index_keys", "indexer_logits"),
        }[which]
        return op, f"{keys}K, fp8", (tuned, "gather")
    if (kind, which) == ("write", "latent"):
        return "cache_write", f"latents, {rows} rows, fp8", ("cache_write", "write")
    return None


def _tag(op: str, key: Hashable, triton: str) -> str:
    """The launch configuration of a key as a sweep calls it; "": the key is no more."""
    try:
        config = launch_config(op, ARCH, key, triton)
    except KeyError:
        return ""
    blocks = ",".join(
        f"{name.removeprefix('BLOCK_')[:3]}{size}" for name, size in config.blocks.items()
    )
    tag = f"{blocks} w{config.num_warps} s{config.num_stages}"
    if op == "indexer_logits" and isinstance(key, tuple) and key[0] == "paged":
        programs = paged_programs_per_sm(config)
        tag += f" p{programs}" * (programs != _SWEPT_PROGRAMS)
    return tag


def main() -> int:
    text, left_out = shipped()
    print(*(f"left out: {case}" for case in left_out), sep="\n", end="\n" if left_out else "")
    if "--check" in sys.argv[1:]:
        if SHIPPED.read_text(encoding="utf-8") != text:
            print(f"{SHIPPED.relative_to(ROOT)} is not of these results: run ci/measured PYTHON")
            return 1
    else:
        SHIPPED.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
