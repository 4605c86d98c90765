"""Documents name files that are there: their links, and paths of this repository in their text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
# Where a path in the text may start: dsa_kernels/layout.py is one of kernels/.
STARTS = [ROOT, *(ROOT / name for name in ("kernels", "model_registry", "dsa_plugin", "recipes"))]
OURS = {path.name for start in STARTS for path in start.iterdir() if path.is_dir()}
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# Not a URL's, an absolute path's, or one with a placeholder such as tests/ops/test_<op>.py.
_PATH = re.compile(r"(?<![\w/.:~-])\w[\w.-]*/[\w./-]*+(?![<*])")


def missing(text: str, folder: Path) -> Iterator[str]:
    """What a document in `folder` names and is not there."""
    for target in _LINK.findall(text):
        if "://" not in target and not target.startswith("#"):
            path = target.partition("#")[0]
            if not (folder / path).exists():
                yield target
    for path in _PATH.findall(_LINK.sub("]", text)):
        name = path.rstrip("./")
        known = any((at / end).exists() for at in STARTS for end in (name, f"{name}.yaml"))
        if name.partition("/")[0] in OURS and not known:
            yield path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_are_there(document: Path) -> None:
    assert list(missing(document.read_text(encoding="utf-8"), document.parent)) == []


def test_a_missing_file_is_noticed() -> None:
    text = (
        "[a](nowhere.md) [b](../README.md#limits) [c](https://host.org/docs/x.md) /docs/no.md "
        "`docs/nothing.md`, ci/recipes, dsa_kernels/layout.py; dsa_kernels/outlay.py. "
        "tests/ops/test_<op>.py demo/vllm-cpu demo/vllm-gpu"
    )
    expected = ["nowhere.md", "docs/nothing.md", "dsa_kernels/outlay.py.", "demo/vllm-gpu"]
    assert list(missing(text, ROOT / "docs")) == expected
