"""Every DSA_* environment variable: name, type, default, meaning. A bad value is an error.

`DSA_TEST_*` belongs to the test suite and is ignored.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

PluginMode = Literal["auto", "on", "off"]
IndexCacheDtype = Literal["auto", "model", "fp8"]
Kernels = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class Variable:
    """One variable as a user sees it; docs/configuration.md's table is checked against this."""

    name: str
    allowed: str
    default: str
    doc: str
    parse: Callable[[str], Any]
    """Text to value; raises ValueError on text that is not allowed."""


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(text)
        return text

    return parse


def _positive_int(text: str) -> int:
    # int() alone would also take "1_000", " 5 " and "+5".
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(text)
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def _path(text: str) -> Path | None:
    return Path(text) if text else None


PLUGIN = Variable(
    "DSA_PLUGIN",
    "auto, on, off",
    "auto",
    "auto takes over where the host has no DSA of its own for this device; on always; off never",
    _choice("auto", "on", "off"),
)
INDEX_CACHE_DTYPE = Variable(
    "DSA_INDEX_CACHE_DTYPE",
    "auto, model, fp8",
    "auto",
    "precision of cached index keys: the model's dtype or fp8; auto: fp8 on a GPU, model on a CPU",
    _choice("auto", "model", "fp8"),
)
LOGITS_WORKSPACE_MB = Variable(
    "DSA_LOGITS_WORKSPACE_MB",
    "an integer >= 1",
    "512",
    "MiB that indexer logits may take, and so may expanded keys; what is longer is done in parts",
    _positive_int,
)
KERNELS = Variable(  # dsa_kernels.dispatch reads it too, which imports nothing of ours
    "DSA_KERNELS",
    "auto, triton, torch",
    "auto",
    "what runs the ops: Triton kernels or eager torch; auto: Triton on a GPU, torch on a CPU",
    _choice("auto", "triton", "torch"),
)
OP_COUNTS = Variable(
    "DSA_OP_COUNTS",
    "a path, or empty for none",
    "",
    "file in which each process keeps how often it ran which op, with its own suffix .<pid>",
    _path,
)
CHECK = Variable(
    "DSA_CHECK",
    "0, 1",
    "0",
    "1 checks every pass: cached entries, selections and NaN; what is wrong is named and ends it",
    _switch,
)
VARIABLES = (PLUGIN, INDEX_CACHE_DTYPE, LOGITS_WORKSPACE_MB, KERNELS, OP_COUNTS, CHECK)


@dataclass(frozen=True, kw_only=True)
class Env:
    """The values of all variables, read once by `Env.load`."""

    plugin: PluginMode
    index_cache_dtype: IndexCacheDtype
    logits_workspace_mb: int
    kernels: Kernels
    op_counts: Path | None
    check: bool

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> "Env":
        """Read and check every DSA_* variable of `environ` (default: this process's).

        Raises:
            ValueError: a value that is not allowed, or a DSA_* name that does not exist (most
                often a typo, which would otherwise leave the default in force silently).
        """
        environ = os.environ if environ is None else environ
        check_names(environ)
        return cls(
            plugin=cast(PluginMode, read(PLUGIN, environ)),
            index_cache_dtype=cast(IndexCacheDtype, read(INDEX_CACHE_DTYPE, environ)),
            logits_workspace_mb=read(LOGITS_WORKSPACE_MB, environ),
            kernels=cast(Kernels, read(KERNELS, environ)),
            op_counts=read(OP_COUNTS, environ),
            check=read(CHECK, environ),
        )

    def index_cache_is_fp8(self, device_type: str) -> bool:
        """What `DSA_INDEX_CACHE_DTYPE` means on a device of this torch type, such as "cpu"."""
        choice = self.index_cache_dtype
        return choice == "fp8" or (choice == "auto" and device_type != "cpu")


def read(variable: Variable, environ: Mapping[str, str]) -> Any:
    """The value of one variable, or its default where unset.

    Raises:
        ValueError: the text is not allowed; names variable, text and what is allowed.
    """
    text = environ.get(variable.name, variable.default)
    try:
        return variable.parse(text)
    except ValueError:
        raise ValueError(
            f"{variable.name}={text!r}; allowed: {variable.allowed}; unset it for "
            f"{variable.default!r} ({variable.doc})"
        ) from None


def check_names(environ: Mapping[str, str]) -> None:
    """Raises ValueError if `environ` has a DSA_* name that is no variable; names the nearest."""
    known = [variable.name for variable in VARIABLES]
    for name in sorted(environ):
        if name.startswith("DSA_") and not name.startswith("DSA_TEST_") and name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{name} is not a variable of dsa-plugin; did you mean {near}? Known: "
                f"{', '.join(known)}. Unset it if it is not meant for this plugin."
            )
