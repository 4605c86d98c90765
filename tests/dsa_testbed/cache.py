"""Where checkpoints and reference answers are kept, and how their keys are made."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REPO = Path(__file__).resolve().parents[2]


def cache_root() -> Path:
    """``DSA_TEST_CACHE``, or ``.cache`` at the root of the repository."""
    return Path(os.environ.get("DSA_TEST_CACHE") or _REPO / ".cache").resolve()


def digest(*parts: bytes | str | Any) -> str:
    """16 hex digits of SHA-256 over the parts; what is neither bytes nor str goes in as JSON."""
    state = hashlib.sha256()
    for part in parts:
        if not isinstance(part, (bytes, str)):
            part = json.dumps(part, sort_keys=True)
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes ``target`` if the body succeeds.

    Readers never see half a checkpoint, and of two processes that build the same one the first
    to finish wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield stage
        stage.chmod(0o755)
        try:
            stage.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
