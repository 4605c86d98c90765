"""What a conversion was made from and has made: dsa_convert.json in its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsa_plugin.convert.atomic import whole_file

MANIFEST = "dsa_convert.json"
_VERSION = 2


@dataclass
class Recorded:
    """A file. Its sha256 is trusted while size and time of change are those recorded."""

    bytes: int
    mtime_ns: int
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path, sha256: str | None = None) -> Recorded:
        """A file as it is now."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, sha256)

    def is_still(self, path: Path) -> bool:
        """Whether the file is the one recorded; it is read where only its sha256 can tell."""
        if not path.is_file():
            return False
        now = Recorded.of(path)
        if now.bytes != self.bytes:
            return False
        return now.mtime_ns == self.mtime_ns or (
            self.sha256 is not None and sha256_of(path) == self.sha256
        )


@dataclass
class Manifest:
    """What a conversion read and wrote.

    to: what the weights became.
    source: the files read, by name; files: those written, each with what it was made from.
    """

    to: str
    source: dict[str, Recorded] = field(default_factory=dict)
    files: dict[str, Recorded] = field(default_factory=dict)
    made_from: dict[str, list[str]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        document = {"version": _VERSION, **asdict(self)}
        with whole_file(folder / MANIFEST) as file:
            file.write((json.dumps(document, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """A folder's; None: it has none.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']}; known: {_VERSION}")
            return cls(
                document["to"],
                _recorded(document["source"]),
                _recorded(document["files"]),
                {str(name): list(files) for name, files in document["made_from"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}); delete {folder} and convert again"
            ) from None

    def check_continues(self, folder: Path, source: Path, names: Iterable[str], to: str) -> None:
        """Refuse to go on with a conversion to something else, or of something else.

        Raises:
            ValueError: which.
        """
        if self.to != to:
            raise ValueError(
                f"{folder} holds a conversion to {self.to}, not {to}; name another folder"
            )
        changed = [
            name
            for name in names
            if name not in self.source or not self.source[name].is_still(source / name)
        ]
        if changed or set(self.source) != set(names):
            raise ValueError(
                f"{folder} holds a conversion of another checkpoint than {source} is now "
                f"({', '.join(changed[:3]) or 'other files'}); name another folder, or delete this"
            )


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded(entries: dict[str, dict[str, Any]]) -> dict[str, Recorded]:
    return {name: Recorded(**entry) for name, entry in entries.items()}
