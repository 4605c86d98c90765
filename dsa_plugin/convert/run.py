"""A whole conversion: what is left to do, by several threads, each file recorded as it is done."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dsa_plugin.convert.atomic import is_partial
from dsa_plugin.convert.companions import CONFIG, companions, write_companions
from dsa_plugin.convert.manifest import MANIFEST, Manifest, Recorded, sha256_of
from dsa_plugin.convert.plan import Plan
from dsa_plugin.convert.shard import Progress, file_bytes, write_shard
from dsa_plugin.safetensors_header import INDEX

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Done:
    """Files of weights written now and kept from an earlier run; weights of the source left out."""

    written: list[str]
    kept: list[str]
    left_out: list[str]


def convert(planned: Plan, workers: int, told: Progress) -> Done:
    """Write what is missing of a conversion. After a failure, the same call goes on.

    Memory: for each worker some pieces of rows.PIECE_BYTES, and the scales of one file.

    Args:
        planned: by plan().
        workers: files converted at a time.
        told: by any thread, of bytes read since it was last, first of those of files kept.

    Raises:
        ValueError: the target holds something else, or a file of the source is damaged.
        OSError: the disk is full or fails.
    """
    target = planned.target
    _check_place(target)
    target.mkdir(parents=True, exist_ok=True)
    with _alone_in(target):
        for path in target.rglob(".*"):
            if is_partial(path):
                path.unlink()
        manifest = _begin(planned)
        missing = [name for name in planned.files if name not in manifest.files]
        kept = sorted(manifest.files)
        told(sum(map(planned.read_bytes, kept)))
        work = _Work(planned, missing, manifest, told)
        try:
            _check_space(planned, missing)
            work.run(workers)
            beside = write_companions(planned.source, target, planned.documents)
        except OSError as error:
            raise work.explained(error) from error
        manifest.files |= {
            name: Recorded.of(target / name, sha256_of(target / name)) for name in beside
        }
        manifest.save(target)
    return Done(missing, kept, companions(planned.source)[1])


class _StoppedError(Exception):
    """Another file has failed."""


class _Work:
    """Files converted by threads, which stop at the first failure."""

    def __init__(self, planned: Plan, missing: Sequence[str], manifest: Manifest, told: Progress):
        self.planned, self.missing, self.manifest, self.told = planned, missing, manifest, told
        self.tensors = planned.source.tensors
        self.unhashed = {n for n in planned.source.shards if manifest.source[n].sha256 is None}
        self.stop = threading.Event()
        self.lock = threading.Lock()

    def run(self, workers: int) -> None:
        """Convert what is missing, and hash what of the source was not yet."""
        names = sorted(self.unhashed.union(self.missing))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # files are what runs in parallel
        pool = ThreadPoolExecutor(workers)
        try:
            for future in as_completed([pool.submit(self._file, name) for name in names]):
                future.result()
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def explained(self, error: OSError) -> OSError:
        """What a full disk lacks, and what is kept."""
        if error.errno not in _FULL:
            return error
        lacking = [name for name in self.missing if name not in self.manifest.files]
        needed = sum(file_bytes(self.planned.files[name]) for name in lacking)
        return OSError(
            f"{self.planned.target} takes no more ({error.strerror}): {len(lacking)} of "
            f"{len(self.planned.files)} files are missing, {needed / 1e9:.3f} GB. What is done is "
            "kept: make room and run the same command again, it goes on"
        )

    def _file(self, name: str) -> None:
        """Hash the source's file of a name and write the target's, of which either may be none."""
        source, target = self.planned.source.folder / name, self.planned.target / name
        sha256 = sha256_of(source) if name in self.unhashed else None
        made = None
        if name in self.missing:
            outputs = self.planned.files[name]
            made = write_shard(target, outputs, self.tensors, self._read)
        with self.lock:
            if sha256:
                self.manifest.source[name].sha256 = sha256
            if made:
                self.manifest.files[name] = Recorded.of(target, made)
                self.manifest.made_from[name] = self.planned.made_from(name)
            self.manifest.save(self.planned.target)

    def _read(self, count: int) -> None:
        if self.stop.is_set():
            raise _StoppedError
        self.told(count)


def _check_place(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder to write")
    found = sorted(path.name for path in target.iterdir() if not is_partial(path))
    if found and MANIFEST not in found:
        raise ValueError(
            f"{target} holds {found[0]}, and no conversion of this command that could go on "
            f"({MANIFEST}); name a folder that is new or empty"
        )


@contextmanager
def _alone_in(target: Path) -> Iterator[None]:
    folder = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process converts into {target}; wait for it") from None
        yield
    finally:
        os.close(folder)


def _begin(planned: Plan) -> Manifest:
    """The target's manifest, without files that are no longer as recorded; or a new one, saved."""
    folder, target = planned.source.folder, planned.target
    names = [*planned.source.shards, CONFIG, *([INDEX] if (folder / INDEX).exists() else [])]
    manifest = Manifest.load(target)
    if manifest is None:
        read = {
            name: Recorded.of(
                folder / name,
                None if name in planned.source.shards else sha256_of(folder / name),
            )
            for name in names
        }
        manifest = Manifest(planned.to, read)
        manifest.save(target)
        return manifest
    manifest.check_continues(target, folder, names, planned.to)
    manifest.files = {
        name: file
        for name, file in manifest.files.items()
        if name in planned.files and file.is_still(target / name)
    }
    return manifest


def _check_space(planned: Plan, missing: Sequence[str]) -> None:
    """Refuse to begin what the disk cannot hold; others may fill it later nevertheless."""
    beside = sum((planned.source.folder / n).stat().st_size for n in companions(planned.source)[0])
    needed = sum(file_bytes(planned.files[name]) for name in missing) + beside + _SLACK_BYTES
    free = shutil.disk_usage(planned.target).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{free / 1e9:.3f} GB free of {needed / 1e9:.3f} GB that are needed"
        )
